#include "bitcore/kernels/registry.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <shared_mutex>
#include <sstream>

#include "bitcore/base/cpu_features.h"
#include "bitcore/exceptions.h"
#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/tiled_kernel.h"

namespace bitcore {
namespace {

using KernelPtr = KernelRegistry::KernelPtr;

constexpr std::string_view kVariable = "BITLAB_KERNEL";

// The one list of built-in kernels, best first: name, requirement and whether this CPU meets it, the multiply-adds that
// it is made of (a loop of benchmarks/limits), its tile functions.
std::vector<KernelPtr> builtin_kernels() {
  std::vector<KernelPtr> kernels;
  const auto add = [&](const char* name, const char* requirement, bool supported, const char* path,
                       const TileFunctions& functions) {
    kernels.push_back(std::make_shared<TiledKernel>(name, requirement, supported, path, functions));
  };
#if defined(__x86_64__)
  add("Int8Avx512VbmiKernel", "AVX-512 VNNI and VBMI", cpu_has_avx512_vbmi(), "vpdpbusd zmm", kInt8Avx512VbmiTiles);
  add("Int8Avx512VnniKernel", "AVX-512 VNNI", cpu_has_avx512_vnni(), "vpdpbusd zmm", kInt8Avx512VnniTiles);
  add("Int8AvxVnniKernel", "AVX-VNNI", cpu_has_avx_vnni(), "vpdpbusd ymm", kInt8AvxVnniTiles);
  add("Int8Avx2Kernel", "AVX2 and FMA", cpu_has_avx2(), "vpmaddubsw ymm", kInt8Avx2Tiles);
#elif defined(__aarch64__)
  add("Int8NeonDotKernel", "NEON dot product", cpu_has_neon_dot(), "sdot", kInt8NeonDotTiles);
  add("Int8NeonKernel", "NEON", true, "smlal", kInt8NeonTiles);
#endif
  add("Int8PortableKernel", "any CPU", true, "int16 baseline", kInt8PortableTiles);
#if defined(__x86_64__)
  add("Float32Avx512Kernel", "AVX-512", cpu_has_avx512(), "fma zmm", kFloat32Avx512Tiles);
  add("Float32Avx2Kernel", "AVX2 and FMA", cpu_has_avx2(), "fma ymm", kFloat32Avx2Tiles);
#elif defined(__aarch64__)
  add("Float32NeonKernel", "NEON", true, "fmla", kFloat32NeonTiles);
#endif
  add("Float32PortableKernel", "any CPU", true, "float32 baseline", kFloat32PortableTiles);
  kernels.push_back(make_reference_kernel());
  return kernels;
}

// Names separated by commas, without the spaces around them.
std::vector<std::string> split_names(const char* text) {
  std::vector<std::string> names;
  std::istringstream parts(text == nullptr ? "" : text);
  for (std::string name; std::getline(parts, name, ',');) {
    const std::size_t first = name.find_first_not_of(" \t");
    if (first == std::string::npos) continue;
    names.push_back(name.substr(first, name.find_last_not_of(" \t") + 1 - first));
  }
  return names;
}

struct State {
  std::shared_mutex mutex;
  std::vector<KernelPtr> kernels = builtin_kernels();  // user kernels first
  std::size_t user_count = 0;
  const std::vector<std::string> named = split_names(std::getenv(kVariable.data()));
};

State& state() {
  static State instance;
  return instance;
}

bool runs(const BitKernelBase& kernel, const BitQuantConfig& config) {
  return kernel.is_supported() && kernel.is_compatible_with(config);
}

// The family name of the activation dtype: an alias for its best kernel.
std::string_view family(ActivationDtype dtype) {
  return dtype == ActivationDtype::int8 ? "Int8Kernel" : "Float32Kernel";
}

KernelPtr first_compatible(const State& s, const BitQuantConfig& config, std::size_t begin) {
  for (std::size_t i = begin; i < s.kernels.size(); ++i) {
    if (runs(*s.kernels[i], config)) return s.kernels[i];
  }
  throw KernelNotFoundError("no kernel covers " + to_string(config));
}

std::string known_names(const State& s) {
  std::string names = "Int8Kernel, Float32Kernel";
  for (const KernelPtr& kernel : s.kernels) names += ", " + std::string(kernel->name());
  return names;
}

KernelPtr find_by_name(const State& s, std::string_view name, const BitQuantConfig& config) {
  if (name == "Int8Kernel" || name == "Float32Kernel") {
    if (name != family(config.activation_dtype)) {
      throw KernelNotFoundError("kernel " + std::string(name) + " does not cover " + to_string(config));
    }
    return first_compatible(s, config, s.user_count);
  }
  for (const KernelPtr& kernel : s.kernels) {
    if (kernel->name() != name) continue;
    if (!kernel->is_supported()) {
      throw KernelNotFoundError("kernel " + std::string(name) + " needs " + std::string(kernel->requirement()) +
                                ", which this CPU does not have");
    }
    if (!kernel->is_compatible_with(config)) {
      throw KernelNotFoundError("kernel " + std::string(name) + " does not cover " + to_string(config));
    }
    return kernel;
  }
  throw KernelNotFoundError("no kernel is named '" + std::string(name) + "'; known: " + known_names(s));
}

bool is_known(const State& s, std::string_view name) {
  return name == "Int8Kernel" || name == "Float32Kernel" ||
         std::any_of(s.kernels.begin(), s.kernels.end(),
                     [&](const KernelPtr& kernel) { return kernel->name() == name; });
}

bool names_config(const State& s, std::string_view name, const BitQuantConfig& config) {
  if (name == family(config.activation_dtype)) return true;
  return std::any_of(s.kernels.begin(), s.kernels.end(),
                     [&](const KernelPtr& kernel) { return kernel->name() == name && runs(*kernel, config); });
}

KernelPtr find_named_by_variable(const State& s, const BitQuantConfig& config) {
  std::string text = std::string(kVariable) + "=";
  for (const std::string& name : s.named) text += (name == s.named.front() ? "" : ",") + name;
  std::vector<std::string> fitting;
  for (const std::string& name : s.named) {
    if (!is_known(s, name)) {
      throw KernelNotFoundError(text + " names '" + name + "', which is no kernel; known: " + known_names(s));
    }
    if (names_config(s, name, config)) fitting.push_back(name);
  }
  if (fitting.size() == 1) return find_by_name(s, fitting.front(), config);
  text += fitting.empty() ? " names no kernel that runs here and covers " : " names more than one kernel for ";
  throw KernelNotFoundError(text + to_string(config) + "; known: " + known_names(s));
}

}  // namespace

KernelPtr KernelRegistry::get_kernel_for_config(const BitQuantConfig& config) {
  State& s = state();
  const std::shared_lock lock(s.mutex);
  return s.named.empty() ? first_compatible(s, config, 0) : find_named_by_variable(s, config);
}

KernelPtr KernelRegistry::get_kernel_by_name(std::string_view name, const BitQuantConfig& config) {
  State& s = state();
  const std::shared_lock lock(s.mutex);
  return find_by_name(s, name, config);
}

std::vector<std::string> KernelRegistry::list_available_kernels() {
  State& s = state();
  const std::shared_lock lock(s.mutex);
  std::vector<std::string> names;
  for (std::size_t i = 0; i < s.kernels.size(); ++i) {
    if (i == s.user_count) names.insert(names.end(), {"Int8Kernel", "Float32Kernel"});
    if (s.kernels[i]->is_supported()) names.emplace_back(s.kernels[i]->name());
  }
  return names;
}

std::vector<KernelPtr> KernelRegistry::all_kernels() {
  State& s = state();
  const std::shared_lock lock(s.mutex);
  return s.kernels;
}

void KernelRegistry::register_kernel(KernelPtr kernel) {
  if (kernel == nullptr) throw BitLabError("kernel is null, expected a kernel");
  State& s = state();
  const std::unique_lock lock(s.mutex);
  const std::string_view name = kernel->name();
  if (is_known(s, name)) throw BitLabError("a kernel named '" + std::string(name) + "' is already registered");
  s.kernels.insert(s.kernels.begin(), std::move(kernel));
  ++s.user_count;
}

void KernelRegistry::unregister_kernel(std::string_view name) {
  State& s = state();
  const std::unique_lock lock(s.mutex);
  for (std::size_t i = 0; i < s.user_count; ++i) {
    if (s.kernels[i]->name() != name) continue;
    s.kernels.erase(s.kernels.begin() + static_cast<std::ptrdiff_t>(i));
    --s.user_count;
    return;
  }
  throw KernelNotFoundError("no registered kernel is named '" + std::string(name) + "'");
}

}  // namespace bitcore
