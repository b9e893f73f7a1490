// The row functions as plain loops that compilers vectorize for the instruction set of the including file.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <cmath>
#include <cstddef>

#include "bitcore/quantize/quantize-inl.h"
#include "bitcore/quantize/row_functions.h"

namespace bitcore {
namespace {

/// Element i goes to lane i mod 16, each lane adds in order; lanes are folded 16 to 8, 4, 2, 1.
/// @tparam T float or double; `magnitude` gives its contribution.
template <class T, class Magnitude>
inline double sum_in_lanes(const T* values, std::int64_t count, Magnitude magnitude) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += magnitude(values[i + lane]);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += magnitude(values[i]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

inline double absolute_sum(const float* values, std::int64_t count) {
  return sum_in_lanes(values, count, [](float value) { return static_cast<double>(std::fabs(value)); });
}

inline void ternary_codes(const float* weight, std::int64_t count, float half, std::uint8_t* codes) {
  for (std::int64_t k = 0; k < count; ++k) {
    const int plus = weight[k] > half;  // false for NaN
    const int minus = weight[k] < -half;
    codes[k] = static_cast<std::uint8_t>(1 + plus - minus);
  }
}

/// Calls piece(first, count) for consecutive pieces of a row: their float32 copies stay in the L1 cache.
inline constexpr std::int64_t kPiece = 512;

template <class Function>
inline void in_pieces(std::int64_t count, Function piece) {
  for (std::int64_t first = 0; first < count; first += kPiece)
    piece(first, count - first < kPiece ? count - first : kPiece);
}

inline void codes_as_floats(const std::int8_t* codes, std::int64_t count, DType dtype, void* out) {
  in_pieces(count, [&](std::int64_t first, std::int64_t size) {
    float values[kPiece];
    for (std::int64_t k = 0; k < size; ++k) values[k] = static_cast<float>(codes[first + k]);
    narrow(values, size, dtype, static_cast<std::byte*>(out) + first * static_cast<std::int64_t>(size_of(dtype)));
  });
}

inline void scaled(const void* in, DType in_dtype, std::int64_t count, const float* factors, std::int64_t factor_step,
                   DType out_dtype, void* out) {
  in_pieces(count, [&](std::int64_t first, std::int64_t size) {
    float values[kPiece];
    widen(static_cast<const std::byte*>(in) + first * static_cast<std::int64_t>(size_of(in_dtype)), in_dtype, size,
          values);
    if (factor_step == 0) {
      for (std::int64_t k = 0; k < size; ++k) values[k] *= factors[0];
    } else {
      for (std::int64_t k = 0; k < size; ++k) values[k] *= factors[first + k];
    }
    narrow(values, size, out_dtype,
           static_cast<std::byte*>(out) + first * static_cast<std::int64_t>(size_of(out_dtype)));
  });
}

constexpr RowFunctions make_row_functions() {
  return {
      .absolute_sum = absolute_sum,
      .absmax = absmax_bits,
      .quantize_x = quantize_x_row,
      .ternary_codes = ternary_codes,
      .codes_as_floats = codes_as_floats,
      .scaled = scaled,
  };
}

}  // namespace
}  // namespace bitcore
