// Runs a saved BitMLP over a batch, with no Python: a complete program on BitLab's public headers.
//
//   run_bitmlp MODEL INPUT OUTPUT [--threads N] [--kernel NAME]
//
// MODEL   what save_pretrained() wrote: a directory with model.safetensors in it, or that file; deployed or not.
// INPUT   a safetensors file whose tensor "x" is (rows, in_channels), float32, bfloat16 or float16.
// OUTPUT  a safetensors file that will hold "y", (rows, out_channels), of the dtype of x.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

namespace {

using bitcore::ConstMatrixView;
using bitcore::ConstVectorView;
using bitcore::DType;
using bitcore::MatrixView;
using bitcore::SafetensorsFile;

// --- the model -------------------------------------------------------------------------------------------------------

// One layer: views of the file, and, where the file holds float weights, the packed copy made of them.
struct Layer {
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  bitcore::BitQuantConfig config;
  std::vector<float> qweight_scale;
  ConstMatrixView qweight;
  ConstVectorView bias;
  std::optional<bitcore::bitlinear::PreparedWeights> prepared;
};

struct Model {
  explicit Model(SafetensorsFile opened) : file(std::move(opened)) {}

  SafetensorsFile file;            // The layers point into it.
  bitcore::BitQuantConfig config;  // A layer may have another.
  std::vector<Layer> layers;
};

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

const std::string& metadata(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) fail("the model's metadata lacks \"" + key + "\": no saved BitMLPModel");
  return found->second;
}

std::int64_t parse_count(const std::string& text, const std::string& name) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    fail(name + " is \"" + text + "\", expected an integer of at least 1");
  }
  return value;
}

std::int64_t metadata_count(const SafetensorsFile& file, const std::string& key) {
  return parse_count(metadata(file, key), key);
}

bool metadata_flag(const SafetensorsFile& file, const std::string& key) {
  const std::string& text = metadata(file, key);
  if (text != "true" && text != "false") fail(key + " is \"" + text + "\", expected \"true\" or \"false\"");
  return text == "true";
}

// The schema of a layer: its own fields, `layers.1.quant_config.activation_dtype`, before those of the model.
bitcore::BitQuantConfig read_quant_config(const SafetensorsFile& file, const std::string& prefix) {
  const auto field = [&](const std::string& key) -> const std::string& {
    const std::string own = prefix + "quant_config." + key;
    return metadata(file, file.metadata().contains(own) ? own : "quant_config." + key);
  };
  const auto granularity = [&](const std::string& key) { return bitcore::parse_granularity(field(key), key); };
  return {.weight_granularity = granularity("weight_granularity"),
          .activation_dtype = bitcore::parse_activation_dtype(field("activation_dtype"), "activation_dtype"),
          .activation_granularity = granularity("activation_granularity")};
}

// A tensor of the model. One that shares the memory of another is stored under that one's name.
const bitcore::TensorEntry& find_tensor(const SafetensorsFile& file, const std::string& name) {
  const auto tie = file.metadata().find("tied." + name);
  return file.tensor(tie == file.metadata().end() ? name : tie->second);
}

bool has_tensor(const SafetensorsFile& file, const std::string& name) {
  return file.contains(name) || file.metadata().contains("tied." + name);
}

void require_rows(const std::string& name, std::int64_t rows, std::int64_t expected) {
  if (rows != expected) {
    fail(name + " has " + std::to_string(rows) + " rows, expected " + std::to_string(expected));
  }
}

constexpr std::uint32_t kInfinity32 = 0x7f800000u;

constexpr std::uint16_t infinity16(DType dtype) { return dtype == DType::bfloat16 ? 0x7f80u : 0x7c00u; }

// Whether no value has all the bits of `infinity`, as Inf and NaN have. The values need not be aligned.
template <class Bits>
bool is_finite(const void* values, std::int64_t count, Bits infinity) {
  for (std::int64_t i = 0; i < count; ++i) {
    Bits value;
    std::memcpy(&value, static_cast<const std::byte*>(values) + static_cast<std::size_t>(i) * sizeof(Bits),
                sizeof(Bits));
    if ((value & infinity) == infinity) return false;
  }
  return true;
}

bool is_finite(const ConstVectorView& values) {
  return values.dtype == DType::float32 ? is_finite(values.data, values.size, kInfinity32)
                                        : is_finite(values.data, values.size, infinity16(values.dtype));
}

ConstVectorView load_bias(const SafetensorsFile& file, const std::string& prefix, std::int64_t out_features) {
  const ConstVectorView bias = find_tensor(file, prefix + "bias").vector();
  require_rows(prefix + "bias", bias.size, out_features);
  if (!is_finite(bias)) fail(prefix + "bias holds NaN or infinity");
  return bias;
}

std::vector<float> load_scale(const SafetensorsFile& file, const std::string& prefix) {
  std::vector<float> scale = find_tensor(file, prefix + "qweight_scale").floats();
  if (!std::ranges::all_of(scale, [](float value) { return std::isfinite(value) && value > 0; })) {
    fail(prefix + "qweight_scale holds a scale that is not finite and positive");
  }
  return scale;
}

void load_deployed(const SafetensorsFile& file, const std::string& prefix, Layer& layer) {
  layer.qweight = find_tensor(file, prefix + "qweight").matrix();
  require_rows(prefix + "qweight", layer.qweight.rows, layer.out_features);
  bitcore::check_qweight(layer.qweight, layer.in_features);
  layer.qweight_scale = load_scale(file, prefix);
}

void load_trainable(const SafetensorsFile& file, const std::string& prefix, Layer& layer) {
  const ConstMatrixView weight = find_tensor(file, prefix + "weight").matrix();
  require_rows(prefix + "weight", weight.rows, layer.out_features);
  if (weight.cols != layer.in_features) {
    fail(prefix + "weight has " + std::to_string(weight.cols) + " columns, expected " +
         std::to_string(layer.in_features));
  }
  layer.prepared = bitcore::bitlinear::prepare_weights(weight, layer.config);
  layer.qweight_scale = layer.prepared->scale;
  layer.qweight = layer.prepared->view();
}

Layer load_layer(const SafetensorsFile& file, std::int64_t index, std::int64_t in_features, std::int64_t out_features) {
  const std::string prefix = "layers." + std::to_string(index) + ".";
  Layer layer;
  layer.in_features = in_features;
  layer.out_features = out_features;
  layer.config = read_quant_config(file, prefix);
  if (has_tensor(file, prefix + "qweight")) {
    load_deployed(file, prefix, layer);
  } else {
    load_trainable(file, prefix, layer);
  }
  if (metadata_flag(file, "bias")) layer.bias = load_bias(file, prefix, out_features);
  return layer;
}

Model read_model(SafetensorsFile file) {
  Model model(std::move(file));
  if (const std::string& type = metadata(model.file, "model_type"); type != "bit_mlp" && type != "BitMLPModel") {
    fail("model_type is \"" + type + "\", expected \"bit_mlp\"");
  }
  model.config = read_quant_config(model.file, "");
  const std::int64_t n_layers = metadata_count(model.file, "n_layers");
  const std::int64_t hidden_dim = metadata_count(model.file, "hidden_dim");
  std::int64_t in_features = metadata_count(model.file, "in_channels");
  for (std::int64_t i = 0; i < n_layers; ++i) {
    const std::int64_t out_features = i + 1 < n_layers ? hidden_dim : metadata_count(model.file, "out_channels");
    model.layers.push_back(load_layer(model.file, i, in_features, out_features));
    in_features = out_features;
  }
  return model;
}

Model load_model(const std::filesystem::path& path) {
  const std::filesystem::path file_path = std::filesystem::is_directory(path) ? path / "model.safetensors" : path;
  return read_model(SafetensorsFile(file_path.string()));
}

// --- running it ------------------------------------------------------------------------------------------------------

// A matrix that owns its memory.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t cols, DType dtype)
      : bytes_(static_cast<std::size_t>(rows * cols) * bitcore::size_of(dtype)),
        view_(bytes_.data(), dtype, rows, cols, cols) {}

  const MatrixView& view() const { return view_; }

 private:
  std::vector<std::byte> bytes_;
  MatrixView view_;
};

// A value above zero and a NaN stay; all else becomes zero. `infinity`: the bits of +Inf.
template <class Bits>
void relu(Bits* values, std::size_t count, Bits sign, Bits infinity) {
  for (std::size_t i = 0; i < count; ++i) {
    const bool is_nan = static_cast<Bits>(values[i] & ~sign) > infinity;
    if ((values[i] & sign) != 0 && !is_nan) values[i] = 0;
  }
}

void relu(const MatrixView& x) {
  const auto count = static_cast<std::size_t>(x.rows * x.cols);
  if (x.dtype == DType::float32) {
    relu<std::uint32_t>(static_cast<std::uint32_t*>(x.data), count, 0x80000000u, kInfinity32);
  } else {
    relu<std::uint16_t>(static_cast<std::uint16_t*>(x.data), count, 0x8000u, infinity16(x.dtype));
  }
}

// Layers with ReLU between them.
Matrix run(const Model& model, ConstMatrixView x, const bitcore::bitlinear::Options& options) {
  std::optional<Matrix> hidden;
  for (const Layer& layer : model.layers) {
    if (hidden) relu(hidden->view());
    Matrix y(x.rows, layer.out_features, x.dtype);
    bitcore::bitlinear::forward(x, layer.qweight_scale, layer.qweight, layer.bias, layer.config, y.view(), options);
    hidden = std::move(y);
    x = hidden->view();
  }
  return std::move(*hidden);
}

// --- files and arguments ---------------------------------------------------------------------------------------------

void write_output(const std::string& path, const Matrix& y) {
  bitcore::SafetensorsWriter writer;
  writer.add("y", y.view());
  writer.save(path);
}

struct Arguments {
  std::vector<std::string> paths;
  int threads = 1;
  std::string kernel;
};

constexpr std::string_view kUsage = "usage: run_bitmlp MODEL INPUT OUTPUT [--threads N] [--kernel NAME]";

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const bool is_option = words[i] == "--threads" || words[i] == "--kernel";
    if (is_option && i + 1 == words.size()) fail(words[i] + " needs a value\n" + std::string(kUsage));
    if (words[i] == "--threads") {
      arguments.threads = static_cast<int>(std::min<std::int64_t>(parse_count(words[++i], "--threads"), 1024));
    } else if (words[i] == "--kernel") {
      arguments.kernel = words[++i];
    } else if (words[i].starts_with("--")) {
      fail("unknown option " + words[i] + "\n" + std::string(kUsage));
    } else {
      arguments.paths.push_back(words[i]);
    }
  }
  if (arguments.paths.size() != 3) fail(std::string(kUsage));
  return arguments;
}

void print_summary(const Model& model, const Matrix& y, const Arguments& arguments, double microseconds) {
  const auto kernel = arguments.kernel.empty()
                          ? bitcore::KernelRegistry::get_kernel_for_config(model.layers.front().config)
                          : bitcore::KernelRegistry::get_kernel_by_name(arguments.kernel, model.layers.front().config);
  std::cout << y.view().rows << " rows through " << model.layers.size() << " layers in " << std::lround(microseconds)
            << " us: " << kernel->name() << ", threads: " << arguments.threads << "\n";
}

void run_program(const Arguments& arguments) {
  const Model model = load_model(arguments.paths[0]);
  const SafetensorsFile input(arguments.paths[1]);
  const bitcore::TensorEntry& x = input.tensor("x");
  bitcore::ThreadPool executor(arguments.threads);
  const bitcore::bitlinear::Options options{.executor = &executor, .kernel = arguments.kernel};
  const auto start = std::chrono::steady_clock::now();
  const Matrix y = run(model, x.matrix(), options);
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  write_output(arguments.paths[2], y);
  print_summary(model, y, arguments, elapsed.count());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run_program(parse_arguments({argv + 1, argv + argc}));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "run_bitmlp: " << error.what() << "\n";
    return 1;
  }
}
