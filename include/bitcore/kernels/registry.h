/// @file registry.h
/// Which kernels there are and which one serves a config. Mirrors `bitcore.kernels.registry`.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/kernels/base.h"

namespace bitcore {

/// The one registry of the process. User kernels come before the built-in ones, the latest first; the built-in list is
/// explicit, best first. All functions are thread-safe.
class KernelRegistry {
 public:
  /// Shared, so that a kernel that is removed while it runs lives until its calls return.
  using KernelPtr = std::shared_ptr<const BitKernelBase>;

  /// The kernel that a call with this config uses: the one that the environment variable BITLAB_KERNEL names where it
  /// is set (comma-separated names, at most one per activation dtype; read once, at first use), else the first that
  /// runs here and is compatible.
  /// @throws KernelNotFoundError that names the config (and the variable).
  static KernelPtr get_kernel_for_config(const BitQuantConfig& config);

  /// A kernel by its name; "Int8Kernel" and "Float32Kernel" name the best of their family on this machine.
  /// @throws KernelNotFoundError where the name is unknown, this CPU lacks what it needs, or it does not fit the
  /// config.
  static KernelPtr get_kernel_by_name(std::string_view name, const BitQuantConfig& config);

  /// Names of what runs here, best first, "Int8Kernel" and "Float32Kernel" included.
  static std::vector<std::string> list_available_kernels();

  /// Every built-in and registered kernel, whether it runs here or not, best first.
  static std::vector<KernelPtr> all_kernels();

  /// Adds a kernel in front of all others.
  /// @throws BitLabError where the name is taken.
  static void register_kernel(KernelPtr kernel);

  /// @throws KernelNotFoundError where no registered kernel has this name (built-in ones stay).
  static void unregister_kernel(std::string_view name);
};

/// Names of the CPU features that decide between the built-in kernels: "avx2", "avx512vnni", "neon", ...
std::vector<std::string_view> cpu_features();

}  // namespace bitcore
