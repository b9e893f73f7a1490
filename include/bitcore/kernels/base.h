/// @file base.h
/// What a kernel is: one whole linear. Mirrors `bitcore.kernels.base`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// The arguments of one call, already validated against each other.
struct LinearArgs {
  ConstMatrixView x;               ///< Floating (M, in_features), or int8 codes where x_scale is given.
  std::span<const float> x_scale;  ///< Empty: the kernel quantizes x itself.
  ConstVectorView qweight_scale;   ///< weight_scale_size() elements of weight_scale_dtype().
  ConstMatrixView qweight;         ///< Packed, in the standard form; its trailer is right, its codes are not checked.
  PackedShape shape;               ///< Of qweight: what its trailer says.
  ConstVectorView bias;            ///< Floating, or none.
  BitQuantConfig config;           ///< Which the kernel is compatible with.
  MatrixView y;                    ///< Floating (M, out_features).
  Executor* executor;              ///< Never null.
  std::span<std::byte> workspace = {};  ///< At least workspace_size() bytes, of any alignment; or empty.
  /// Scales per group, of which there are many, have not been looked at: the kernel finds those that are not finite and
  /// positive.
  bool check_scales = false;
};

/// Base class of every kernel. A kernel reads the standard packed form, keeps no state between calls, and is called by
/// any number of threads at once.
class BitKernelBase {
 public:
  virtual ~BitKernelBase() = default;

  /// Unique in the registry, for example "Int8Avx512VnniKernel".
  virtual std::string_view name() const = 0;

  /// What the kernel needs of the machine, for people: "AVX-512 VNNI", "any CPU".
  virtual std::string_view requirement() const { return "any CPU"; }

  /// The multiply-adds that the kernel is made of, as `bitlab bench` names its limits; empty: not known.
  virtual std::string_view path() const { return {}; }

  /// Whether this machine meets the requirement.
  virtual bool is_supported() const { return true; }

  /// Whether the kernel computes this config.
  virtual bool is_compatible_with(const BitQuantConfig& config) const = 0;

  /// Bytes of scratch memory with which a call for up to `tokens` rows of x on up to `threads` threads allocates
  /// nothing. 0 (unless overridden): the kernel takes none and may allocate.
  virtual std::size_t workspace_size(std::int64_t tokens, const PackedShape& shape, const BitQuantConfig& config,
                                     int threads) const {
    static_cast<void>(tokens), static_cast<void>(shape), static_cast<void>(config), static_cast<void>(threads);
    return 0;
  }

  /// Computes args.y by the contract.
  /// @throws QuantizationError where the payload of qweight holds an invalid code, or with check_scales a scale is not
  /// finite and positive (y is then unspecified).
  virtual void operator()(const LinearArgs& args) const = 0;

  /// How many tiles this kernel has computed: proof of which kernel ran.
  std::uint64_t tile_calls() const { return tile_calls_.load(std::memory_order_relaxed); }

 protected:
  /// Adds to tile_calls().
  void count_tiles(std::uint64_t tiles) const { tile_calls_.fetch_add(tiles, std::memory_order_relaxed); }

 private:
  mutable std::atomic<std::uint64_t> tile_calls_{0};
};

}  // namespace bitcore
