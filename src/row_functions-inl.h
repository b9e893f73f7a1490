// The row functions as plain loops that compilers vectorize for the instruction set of the including file.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <cmath>

#include "ops/packing_internal.h"
#include "quantize-inl.h"
#include "row_functions.h"

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

/// Field f of byte j is code 4 f + j.
inline void pack_two_bit(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride) {
  for (std::int64_t step = 0; step < steps; ++step, codes += kStepCodes, words += word_stride) {
    store_word(words,
               load_word(codes) | load_word(codes + 4) << 2 | load_word(codes + 8) << 4 | load_word(codes + 12) << 6);
  }
}

/// Digit f of byte j is code 4 f + j. No byte exceeds 242: nothing is carried.
inline void pack_base3(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride) {
  for (std::int64_t step = 0; step < steps; ++step, codes += kBase3StepCodes, words += word_stride) {
    std::uint32_t word = load_word(codes + 16);
    for (int f = 3; f >= 0; --f) word = 3 * word + load_word(codes + 4 * f);
    store_word(words, word);
  }
}

constexpr RowFunctions make_row_functions() {
  return {
      .absolute_sum = absolute_sum,
      .absmax = absmax_bits,
      .quantize_x = quantize_x_row,
      .ternary_codes = ternary_codes,
      .pack_two_bit = pack_two_bit,
      .pack_base3 = pack_base3,
  };
}

}  // namespace
}  // namespace bitcore
