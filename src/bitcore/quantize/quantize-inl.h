// Row-wise pieces of quantization, in plain loops that compilers vectorize for the instruction set
// of the including file. In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bitcore/base/float_types-inl.h"
#include "bitcore/ops/base.h"

namespace bitcore {
namespace {

/// Bits of the largest magnitude. As integers, magnitudes order like floats and NaN above infinity: none is lost.
inline std::uint32_t absmax_bits(const float* x, std::int64_t count) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(x[i]) & kAbsMask);
    largest = largest > bits ? largest : bits;
  }
  return static_cast<std::uint32_t>(largest);
}

inline float quiet_nan() { return std::numeric_limits<float>::quiet_NaN(); }

/// s_x = max(absmax, 1e-5) / 127, NaN where absmax is not finite.
inline float x_scale_of(std::uint32_t absmax) {
  if (absmax >= kInfinityBits) return quiet_nan();
  return std::max(std::bit_cast<float>(absmax), kScaleFloor) / 127.0f;
}

/// Half to even, for |value| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction.
inline float round_half_even(float value) { return (value + 12582912.0f) - 12582912.0f; }

/// clamp(round(value), low, high) for integral bounds; NaN gives 0.
inline float round_clamped(float value, float low, float high) {
  float clamped = value < high ? value : high;
  clamped = clamped > low ? clamped : low;
  const float rounded = round_half_even(clamped);
  return value == value ? rounded : 0.0f;
}

/// q_x = clamp(round(x / scale), -128, 127); returns the sum of the codes.
inline std::int32_t quantize_x_row(const float* x, std::int64_t count, float scale, std::int8_t* codes) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto code = static_cast<std::int32_t>(round_clamped(x[i] / scale, -128.0f, 127.0f));
    codes[i] = static_cast<std::int8_t>(code);
    sum += code;
  }
  return sum;
}

}  // namespace
}  // namespace bitcore
