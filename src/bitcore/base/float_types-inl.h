// Conversions between float32 and the 16-bit floating types, element by element in plain integer arithmetic, so that
// compilers vectorize them and flush-to-zero modes do not change them.
//
// Everything is in an unnamed namespace on purpose: this header is compiled with different instruction sets, and an
// ordinary inline function would be merged into one copy that an older CPU may not be able to run.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "bitcore/tensor.h"

namespace bitcore {
namespace {

inline constexpr std::uint32_t kAbsMask = 0x7fffffffu;
inline constexpr std::uint32_t kInfinityBits = 0x7f800000u;

inline float bfloat16_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<std::uint16_t>((bits & kAbsMask) > kInfinityBits ? quiet_nan : rounded);
}

inline float float16_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  const std::uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // (255 - 31) or (127 - 15) << 23
  const std::uint32_t normal = (magnitude << 13) + rebias;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t bits = magnitude < 0x0400u ? std::bit_cast<std::uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(bits | sign);
}

inline std::uint16_t float_to_float16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & kAbsMask;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal: rebias the exponent and round off 13 bits, ties to even.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5, whose last bit is worth 2^-24, lets the addition round.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > kInfinityBits ? 0x7e00u : half;
  return static_cast<std::uint16_t>(half | sign);
}

/// Reads `count` floating elements as float32.
inline void widen(const void* source, DType dtype, std::int64_t count, float* out) {
  if (count == 0) return;  // Then there may be no memory, of which memcpy may not be told.
  if (dtype == DType::float32) {
    std::memcpy(out, source, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const auto* in = static_cast<const std::uint16_t*>(source);
  if (dtype == DType::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(in[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = float16_to_float(in[i]);
  }
}

/// Element `index` of floating ones, as float32.
inline float widened(const void* source, DType dtype, std::int64_t index) {
  float value;
  widen(static_cast<const std::byte*>(source) + static_cast<std::size_t>(index) * size_of(dtype), dtype, 1, &value);
  return value;
}

/// Writes `count` float32 elements, each rounded once to nearest even.
inline void narrow(const float* in, std::int64_t count, DType dtype, void* destination) {
  if (count == 0) return;  // As above.
  if (dtype == DType::float32) {
    std::memcpy(destination, in, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  auto* out = static_cast<std::uint16_t*>(destination);
  if (dtype == DType::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(in[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = float_to_float16(in[i]);
  }
}

}  // namespace
}  // namespace bitcore
