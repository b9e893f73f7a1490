// The driver that all built-in fast kernels share: quantize, split, thread, unpack, multiply, store.
#pragma once

#include <cassert>
#include <string_view>

#include "bitcore/kernels/base.h"
#include "bitcore/kernels/tile_functions.h"

namespace bitcore {

/// A kernel made of tile functions. Few rows of x go through `direct`, more through panels and `gemm` where it has
/// them.
class TiledKernel final : public BitKernelBase {
 public:
  /// All arguments outlive the kernel.
  TiledKernel(std::string_view name, std::string_view requirement, bool supported, std::string_view path,
              const TileFunctions& functions)
      : name_(name), requirement_(requirement), path_(path), supported_(supported), functions_(functions) {
    assert(functions.direct_tokens <= kMostDirectTokens);
  }

  std::string_view name() const override { return name_; }
  std::string_view requirement() const override { return requirement_; }
  std::string_view path() const override { return path_; }
  bool is_supported() const override { return supported_; }
  bool is_compatible_with(const BitQuantConfig& config) const override {
    return config.activation_dtype == functions_.activation_dtype;
  }
  std::size_t workspace_size(std::int64_t tokens, const PackedShape& shape, const BitQuantConfig& config,
                             int threads) const override;
  void operator()(const LinearArgs& args) const override;

 private:
  std::string_view name_;
  std::string_view requirement_;
  std::string_view path_;
  bool supported_;
  const TileFunctions& functions_;
};

}  // namespace bitcore
