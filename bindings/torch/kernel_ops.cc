// What the registry knows, for Python.
#include <string>
#include <string_view>

#include "bitcore/exceptions.h"
#include "bitcore/kernels/registry.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

std::string quoted(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    json += c;
  }
  return json + '"';
}

template <class Items, class ToJson>
std::string list(const Items& items, const ToJson& to_json) {
  std::string json;
  for (const auto& item : items) json += (json.empty() ? "" : ", ") + to_json(item);
  return "[" + json + "]";
}

// The configs that a kernel covers, as Python's BitQuantConfig takes them.
std::string covered_configs(const BitKernelBase& kernel) {
  std::string json;
  for (const BitQuantConfig& config : all_configs()) {
    if (!kernel.is_compatible_with(config)) continue;
    json += (json.empty() ? "[" : ", [") + quoted(to_string(config.weight_granularity)) + ", " +
            quoted(to_string(config.activation_dtype)) + ", " + quoted(to_string(config.activation_granularity)) +
            ", " + std::to_string(config.group_size) + "]";
  }
  return "[" + json + "]";
}

std::string describe(const KernelRegistry::KernelPtr& kernel) {
  return "{\"name\": " + quoted(kernel->name()) + ", \"requirement\": " + quoted(kernel->requirement()) +
         ", \"path\": " + quoted(kernel->path()) + ", \"supported\": " + (kernel->is_supported() ? "true" : "false") +
         ", \"configs\": " + covered_configs(*kernel) + "}";
}

std::string best_of_family(const char* family, bool int8_activations) {
  const BitQuantConfig config = make_config(false, int8_activations, false);
  return quoted(family) + ": " + quoted(KernelRegistry::get_kernel_by_name(family, config)->name());
}

}  // namespace

std::string take_string(StringArgument argument) {
  std::size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
  return text;
}

std::string list_kernels() {
  return "{\"cpu_features\": " + list(cpu_features(), quoted) +
         ", \"kernels\": " + list(KernelRegistry::all_kernels(), describe) + ", \"aliases\": {" +
         best_of_family("Int8Kernel", true) + ", " + best_of_family("Float32Kernel", false) + "}}";
}

std::int64_t kernel_tile_calls(StringArgument argument) {
  const std::string name = take_string(argument);
  for (const KernelRegistry::KernelPtr& kernel : KernelRegistry::all_kernels()) {
    if (kernel->name() == name) return static_cast<std::int64_t>(kernel->tile_calls());
  }
  throw KernelNotFoundError("no kernel is named '" + name + "'");
}

}  // namespace bitcore::torch_ops
