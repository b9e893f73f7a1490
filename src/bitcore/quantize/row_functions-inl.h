// The row functions as plain loops that compilers vectorize for the instruction set of the including file.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>

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

// Float16 as their bits: eight columns of a row, and of the one eight rows below it. (By reference: without AVX there
// is no register of this size to pass.)
typedef std::uint16_t Halves __attribute__((vector_size(32)));

[[gnu::always_inline]] inline void load_rows(const std::byte* row, std::int64_t row_bytes, Halves& halves,
                                             Halves& largest) {
#ifdef __AVX2__
  const auto* below_row = reinterpret_cast<const __m128i*>(row + 8 * row_bytes);
  const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
  halves = std::bit_cast<Halves>(_mm256_inserti128_si256(first, _mm_loadu_si128(below_row), 1));
#else
  std::memcpy(&halves, row, 16);
  std::memcpy(reinterpret_cast<std::byte*>(&halves) + 16, row + 8 * row_bytes, 16);
#endif
  const Halves below = halves - 1;
  largest = below > largest ? below : largest;
}

[[gnu::always_inline]] inline void widen_halves(const Halves& halves, float* out) {
#ifdef __F16C__
  const auto bits = std::bit_cast<__m256i>(halves);
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(bits)));
  _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)));
#else
  for (int i = 0; i < 16; ++i) out[i] = float16_to_float(halves[i]);
#endif
}

// Elements of a and b in turn: the lower and the upper four of each half.
[[gnu::always_inline]] inline void zip(const Halves& a, const Halves& b, Halves& lower, Halves& upper) {
  lower = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
  upper = __builtin_shufflevector(a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
}

// The same of pairs of elements.
[[gnu::always_inline]] inline void zip_pairs(const Halves& a, const Halves& b, Halves& lower, Halves& upper) {
  lower = __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 8, 9, 24, 25, 10, 11, 26, 27);
  upper = __builtin_shufflevector(a, b, 4, 5, 20, 21, 6, 7, 22, 23, 12, 13, 28, 29, 14, 15, 30, 31);
}

// Two columns of rows 0 to 3 in a, of rows 4 to 7 in b.
[[gnu::always_inline]] inline void widen_columns(const Halves& a, const Halves& b, float* out,
                                                 std::int64_t out_stride) {
  widen_halves(__builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27), out);
  widen_halves(__builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31),
               out + out_stride);
}

// Column c of 16 rows, of eight columns, goes to out + c * out_stride. `largest`: see transpose_scales. Variables, and
// no arrays, which GCC 12 would keep in memory.
[[gnu::always_inline]] inline void transpose_block(const std::byte* rows, std::int64_t row_bytes, float* out,
                                                   std::int64_t out_stride, Halves& largest) {
  Halves a, b, c, d, e, f, g, h;
  load_rows(rows, row_bytes, a, largest);
  load_rows(rows + row_bytes, row_bytes, b, largest);
  load_rows(rows + 2 * row_bytes, row_bytes, c, largest);
  load_rows(rows + 3 * row_bytes, row_bytes, d, largest);
  load_rows(rows + 4 * row_bytes, row_bytes, e, largest);
  load_rows(rows + 5 * row_bytes, row_bytes, f, largest);
  load_rows(rows + 6 * row_bytes, row_bytes, g, largest);
  load_rows(rows + 7 * row_bytes, row_bytes, h, largest);
  Halves ab0, ab4, cd0, cd4, ef0, ef4, gh0, gh4;  // from this column on, four of them
  zip(a, b, ab0, ab4);
  zip(c, d, cd0, cd4);
  zip(e, f, ef0, ef4);
  zip(g, h, gh0, gh4);
  Halves ad0, ad2, ad4, ad6, eh0, eh2, eh4, eh6;  // two of them
  zip_pairs(ab0, cd0, ad0, ad2);
  zip_pairs(ab4, cd4, ad4, ad6);
  zip_pairs(ef0, gh0, eh0, eh2);
  zip_pairs(ef4, gh4, eh4, eh6);
  widen_columns(ad0, eh0, out, out_stride);
  widen_columns(ad2, eh2, out + 2 * out_stride, out_stride);
  widen_columns(ad4, eh4, out + 4 * out_stride, out_stride);
  widen_columns(ad6, eh6, out + 6 * out_stride, out_stride);
}

// Bits of a float16, less one and unsigned, are below 0x7bff where it is finite and positive.
inline std::uint32_t transpose_scales(const void* scales, std::int64_t row_step, std::int64_t rows, std::int64_t groups,
                                      float* out, std::int64_t out_stride) {
  constexpr std::int64_t kRows = 16, kColumns = 8;
  const auto* bytes = static_cast<const std::byte*>(scales);
  const std::int64_t row_bytes = 2 * row_step;
  const std::int64_t in_blocks = rows == kRows ? groups / kColumns * kColumns : 0;
  Halves largest = {};
  for (std::int64_t group = 0; group < in_blocks; group += kColumns) {
    transpose_block(bytes + 2 * group, row_bytes, out + group * out_stride, out_stride, largest);
  }
  std::uint16_t most = 0;
  for (int i = 0; i < 16; ++i) most = most > largest[i] ? most : largest[i];
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t group = in_blocks; group < groups; ++group) {
      std::uint16_t bits;
      std::memcpy(&bits, bytes + row * row_bytes + 2 * group, sizeof(bits));
      const auto below = static_cast<std::uint16_t>(bits - 1);
      most = most > below ? most : below;
      out[group * out_stride + row] = float16_to_float(bits);
    }
  }
  return most >= 0x7bff ? 1u : 0u;
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
      .transpose_scales = transpose_scales,
      .scaled = scaled,
  };
}

}  // namespace
}  // namespace bitcore
