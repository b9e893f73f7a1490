// TileFunctions::store: what follows the sums, in plain loops that compilers vectorize for the instruction set of the
// including file. In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <cstdint>

#include "bitcore/base/float_types-inl.h"
#include "bitcore/kernels/tile_functions.h"

namespace bitcore {
namespace {

/// Of int32 modulo 2^32, as the sums of codes may pass its bounds where those of weights do not.
inline float sum_minus(std::int32_t sum, std::int32_t offset) {
  return static_cast<float>(
      static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) - static_cast<std::uint32_t>(offset)));
}
inline float sum_minus(float sum, std::int32_t) { return sum; }

/// Writes `count` outputs of one token, up to 16: three float32 operations in this order, then one rounding to Type.
/// Inputs are readable up to 16. @param offset Activation::sum. A constant count and Type let outputs go from registers
/// to y.
template <class Sum, bool HasBias, DType Type>
[[gnu::always_inline]] inline void store_lanes(const Sum* sums, std::int32_t offset, float x_scale,
                                               const float* w_scale, const float* bias, std::int64_t count,
                                               std::byte* y) {
  constexpr std::int64_t kLanes = 16;
  float out[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) out[i] = sum_minus(sums[i], offset) * (x_scale * w_scale[i]);
  if constexpr (HasBias) {
    for (std::int64_t i = 0; i < kLanes; ++i) out[i] = out[i] + bias[i];
  }
  narrow(out, count, Type, y);
}

template <class Sum, bool HasBias, DType Type>
inline void store_block(const StoreBlock& block) {
  constexpr std::int64_t kLanes = 16;
  constexpr std::int64_t kElement = Type == DType::float32 ? 4 : 2;
  const std::int64_t full = block.rows / kLanes * kLanes;
  for (std::int64_t m = 0; m < block.tokens; ++m) {
    const Sum* sums = static_cast<const Sum*>(block.sums) + m * block.sums_stride;
    std::byte* y = block.y + m * block.y_stride;
    const float scale = block.x[m].scale;
    const auto store = [&](std::int64_t row, std::int64_t count) {
      store_lanes<Sum, HasBias, Type>(sums + row, block.x[m].sum, scale, block.w_scale + row,
                                      HasBias ? block.bias + row : nullptr, count, y + row * kElement);
    };
    for (std::int64_t row = 0; row < full; row += kLanes) store(row, kLanes);
    if (full < block.rows) store(full, block.rows - full);
  }
}

template <class Sum, bool HasBias>
inline void store_typed(const StoreBlock& block) {
  switch (block.dtype) {
    case DType::bfloat16:
      return store_block<Sum, HasBias, DType::bfloat16>(block);
    case DType::float16:
      return store_block<Sum, HasBias, DType::float16>(block);
    default:
      return store_block<Sum, HasBias, DType::float32>(block);
  }
}

/// TileFunctions::store. @tparam Sum int32 (int8 activations) or float (float32 activations).
template <class Sum>
inline void store_sums(const StoreBlock& block) {
  if (block.bias != nullptr) {
    store_typed<Sum, true>(block);
  } else {
    store_typed<Sum, false>(block);
  }
}

}  // namespace
}  // namespace bitcore
