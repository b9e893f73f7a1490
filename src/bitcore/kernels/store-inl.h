// TileFunctions::store: what follows the sums, in plain loops that compilers vectorize for the instruction set of the
// including file. In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bitcore/base/float_types-inl.h"
#include "bitcore/kernels/tile_functions.h"

namespace bitcore {
namespace {

/// Of int32 modulo 2^32, as the sums of codes may pass its bounds where those of weights do not.
inline float with_offset(std::int32_t sum, std::int32_t offset) {
  return static_cast<float>(
      static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) + static_cast<std::uint32_t>(offset)));
}
inline float with_offset(float sum, std::int32_t) { return sum; }

/// Registers of so many bytes.
template <std::size_t Bytes>
struct Lanes {
  typedef float Floats __attribute__((vector_size(Bytes)));
  typedef std::int32_t Ints __attribute__((vector_size(Bytes)));
};

// The widest that the including file is compiled for.
#if defined(__AVX512F__)
inline constexpr std::size_t kLaneBytes = 64;
#elif defined(__AVX2__)
inline constexpr std::size_t kLaneBytes = 32;
#else
inline constexpr std::size_t kLaneBytes = 16;
#endif

/// The sums of one group of k in a register, of adjacent rows and one token, scaled and added to `sums`, those of all
/// groups before.
template <std::size_t Bytes>
struct GroupSums {
  using Floats = typename Lanes<Bytes>::Floats;
  using Ints = typename Lanes<Bytes>::Ints;
  static constexpr std::int64_t kLanes = Bytes / sizeof(float);

  [[gnu::always_inline]] static void add(const Ints& group, Activation x, const float* w_scale, float* sums) {
    add(__builtin_convertvector(group + x.offset, Floats), x, w_scale, sums);
  }

  [[gnu::always_inline]] static void add(const Floats& group, Activation x, const float* w_scale, float* sums) {
    Floats scale, total;
    std::memcpy(&scale, w_scale, Bytes);
    std::memcpy(&total, sums, Bytes);
    total = total + group * (x.scale * scale);
    std::memcpy(sums, &total, Bytes);
  }
};

/// The same of [token][Rows] in memory. Kernels that hold a group's sums in registers call GroupSums in loops of
/// their own, and without closures: through one GCC 12 keeps arrays of registers in memory.
template <std::int64_t Rows, class Sum>
[[gnu::always_inline]] inline void add_groups(const Sum* group, std::int64_t tokens, const Activation* x,
                                              const float* w_scale, float* sums) {
  using Registers = GroupSums<kLaneBytes>;
  using Register = std::conditional_t<std::is_same_v<Sum, float>, typename Registers::Floats, typename Registers::Ints>;
  for (std::int64_t m = 0; m < tokens; ++m) {
    for (std::int64_t row = 0; row < Rows; row += Registers::kLanes) {
      const std::int64_t i = m * Rows + row;
      Register lanes;
      std::memcpy(&lanes, group + i, sizeof(lanes));
      Registers::add(lanes, x[m], w_scale + row, sums + i);
    }
  }
}

/// Calls multiply(first, count, sums), which adds those of k [first, first + count), once for all `k_count` k, or for
/// each of their groups, whose sums, [Tokens][Rows], it scales and adds to `sums`.
/// @param groups Null if there are none. @param tokens Up to Tokens. @param sums Sum, or with groups float.
template <std::int64_t Rows, int Tokens, class Sum, class Multiply>
[[gnu::always_inline]] inline void multiply_by_groups(const Groups* groups, std::int64_t tokens, std::int64_t k_count,
                                                      void* sums, const Multiply& multiply) {
  if (groups == nullptr) return multiply(0, k_count, static_cast<Sum*>(sums));
  const Activation* x = groups->x;
  const float* w_scale = groups->w_scale;
  for (std::int64_t first = 0; first < k_count; first += groups->k, x += groups->x_stride, w_scale += Rows) {
    alignas(64) Sum group[Tokens * Rows];
    std::memset(group, 0, static_cast<std::size_t>(tokens * Rows) * sizeof(Sum));
    multiply(first, groups->k < k_count - first ? groups->k : k_count - first, group);
    add_groups<Rows>(group, tokens, x, w_scale, static_cast<float*>(sums));
  }
}

/// Writes `count` outputs of one token, up to 16: three float32 operations in this order, of sums that are Scaled
/// already only the last, then one rounding to Type. Inputs are readable up to 16. @param offset Activation::offset. A
/// constant count and Type let outputs go from registers to y.
template <class Sum, bool Scaled, bool HasBias, DType Type>
[[gnu::always_inline]] inline void store_lanes(const Sum* sums, std::int32_t offset, float x_scale,
                                               const float* w_scale, const float* bias, std::int64_t count,
                                               std::byte* y) {
  constexpr std::int64_t kLanes = 16;
  float out[kLanes];
  if constexpr (Scaled) {
    for (std::int64_t i = 0; i < kLanes; ++i) out[i] = sums[i];
  } else {
    for (std::int64_t i = 0; i < kLanes; ++i) out[i] = with_offset(sums[i], offset) * (x_scale * w_scale[i]);
  }
  if constexpr (HasBias) {
    for (std::int64_t i = 0; i < kLanes; ++i) out[i] = out[i] + bias[i];
  }
  narrow(out, count, Type, y);
}

template <class Sum, bool Scaled, bool HasBias, DType Type>
inline void store_block(const StoreBlock& block) {
  constexpr std::int64_t kLanes = 16;
  constexpr std::int64_t kElement = Type == DType::float32 ? 4 : 2;
  const std::int64_t full = block.rows / kLanes * kLanes;
  for (std::int64_t m = 0; m < block.tokens; ++m) {
    const Sum* sums = static_cast<const Sum*>(block.sums) + m * block.sums_stride;
    std::byte* y = block.y + m * block.y_stride;
    const Activation x = Scaled ? Activation{} : block.x[m];
    const auto store = [&](std::int64_t row, std::int64_t count) {
      store_lanes<Sum, Scaled, HasBias, Type>(sums + row, x.offset, x.scale, Scaled ? nullptr : block.w_scale + row,
                                              HasBias ? block.bias + row : nullptr, count, y + row * kElement);
    };
    for (std::int64_t row = 0; row < full; row += kLanes) store(row, kLanes);
    if (full < block.rows) store(full, block.rows - full);
  }
}

template <class Sum, bool Scaled, bool HasBias>
inline void store_typed(const StoreBlock& block) {
  switch (block.dtype) {
    case DType::bfloat16:
      return store_block<Sum, Scaled, HasBias, DType::bfloat16>(block);
    case DType::float16:
      return store_block<Sum, Scaled, HasBias, DType::float16>(block);
    default:
      return store_block<Sum, Scaled, HasBias, DType::float32>(block);
  }
}

template <class Sum, bool Scaled>
inline void store_with_bias(const StoreBlock& block) {
  if (block.bias != nullptr) {
    store_typed<Sum, Scaled, true>(block);
  } else {
    store_typed<Sum, Scaled, false>(block);
  }
}

/// TileFunctions::store. @tparam Sum int32 (int8 activations) or float (float32 activations).
template <class Sum>
inline void store_sums(const StoreBlock& block) {
  if (block.x == nullptr) {
    store_with_bias<float, true>(block);
  } else {
    store_with_bias<Sum, false>(block);
  }
}

}  // namespace
}  // namespace bitcore
