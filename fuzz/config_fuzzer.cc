// Any text as a configuration: names of granularities, dtypes, layouts and kernels, and the metadata from which a
// BitMLP is made. Refused with the documented error, or it means what it says.
#include "bitcore/config.h"
#include "bitcore/exceptions.h"
#include "bitcore/kernels/registry.h"
#include "bitmodels/mlp.h"
#include "fuzz/support.h"

namespace bitcore::fuzz {
namespace {

// A name is refused, or parses to what prints as the same name.
template <class Parse>
void check_round_trip(std::string_view text, const Parse& parse) {
  throws<QuantizationError>([&] { require(to_string(parse(text)) == text, "a name prints as it was read"); });
}

void check_names(std::string_view text) {
  check_round_trip(text, [](std::string_view name) { return parse_granularity(name, "granularity"); });
  check_round_trip(text, [](std::string_view name) { return parse_activation_dtype(name, "activation_dtype"); });
  check_round_trip(text, [](std::string_view name) { return parse_layout(name); });
  throws<KernelNotFoundError>([&] {
    const auto kernel = KernelRegistry::get_kernel_by_name(text, {});
    require(kernel->name() == text || text == "Int8Kernel", "a kernel is found by its name");
  });
}

std::map<std::string, std::string> parse_lines(std::string_view text) {
  std::map<std::string, std::string> lines;
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    const std::size_t equals = std::min(line.find('='), line.size());
    lines[std::string(line.substr(0, equals))] = line.substr(std::min(line.size(), equals + 1));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
  }
  return lines;
}

// A text that means a number may be written in other ways.
bool means(const std::string& text, std::int64_t number) {
  return text == std::to_string(number) || std::strtod(text.c_str(), nullptr) == static_cast<double>(number);
}

void check_model(const bitmodels::BitMLPModel& model, const std::map<std::string, std::string>& metadata) {
  const bitmodels::BitMLPConfig& config = model.config();
  require(means(metadata.at("n_layers"), static_cast<std::int64_t>(model.layers().size())),
          "the model has n_layers layers");
  require(to_string(config.quant_config.weight_granularity) == metadata.at("quant_config.weight_granularity"),
          "the model has the configured weight_granularity");
  require(to_string(config.quant_config.activation_dtype) == metadata.at("quant_config.activation_dtype"),
          "the model has the configured activation_dtype");
  require(means(metadata.at("out_channels"), config.out_channels), "the model has out_channels outputs");
  const std::vector<float> x(static_cast<std::size_t>(config.in_channels), 1.0f);
  std::vector<float> y(static_cast<std::size_t>(config.out_channels));
  model.forward({x.data(), 1, config.in_channels}, {y.data(), 1, config.out_channels}, {&serial_executor(), {}});
}

void check(std::string_view input) {
  const std::map<std::string, std::string> metadata = parse_lines(input.substr(1));
  if (!metadata.empty()) check_names(metadata.begin()->second);
  static const std::map<std::string, FileTensor> tensors[] = {mlp_tensors(false), mlp_tensors(true)};
  throws<QuantizationError>([&] {
    const std::string file = safetensors(metadata, tensors[input[0] & 1]);
    check_model(bitmodels::BitMLPModel::from_file(SafetensorsFile::from_bytes(std::as_bytes(std::span(file)), "input"),
                                                  serial_executor()),
                metadata);
  });
}

}  // namespace
}  // namespace bitcore::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return -1;
  bitcore::fuzz::check({reinterpret_cast<const char*>(data), size});
  return 0;
}
