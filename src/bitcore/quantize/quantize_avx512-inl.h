// Quantization of activations with AVX-512 F and BW. Division is nearly all of it: the plain loop of
// quantize-inl.h, which GCC narrows in many steps, takes twice as long.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bitcore {
namespace {

/// clamp(round(x / scale), -128, 127), half to even, as int32; 0 where the quotient is NaN.
inline __m512i rounded_quotients(__m512 x, __m512 scale) {
  constexpr int kHalfToEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 quotient = _mm512_div_ps(x, scale);
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(quotient, _mm512_set1_ps(-128.0f)), _mm512_set1_ps(127.0f));
  return _mm512_maskz_cvt_roundps_epi32(_mm512_cmp_ps_mask(quotient, quotient, _CMP_ORD_Q), clamped, kHalfToEven);
}

/// quantize_x_row of quantize-inl.h.
inline std::int32_t quantize_x_row_avx512(const float* x, std::int64_t count, float scale, std::int8_t* codes) {
  constexpr std::int64_t kLanes = 16;
  const __m512 scales = _mm512_set1_ps(scale);
  __m512i sums = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const __m512i rounded = rounded_quotients(_mm512_loadu_ps(x + i), scales);
    sums = _mm512_add_epi32(sums, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(rounded));
  }
  if (i < count) {
    const auto lanes = static_cast<__mmask16>((1u << (count - i)) - 1u);
    const __m512i rounded =
        _mm512_maskz_mov_epi32(lanes, rounded_quotients(_mm512_maskz_loadu_ps(lanes, x + i), scales));
    sums = _mm512_add_epi32(sums, rounded);
    _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(rounded));
  }
  return _mm512_reduce_add_epi32(sums);
}

}  // namespace
}  // namespace bitcore
