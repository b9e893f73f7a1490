// Sixteen floats: what every operation of a language model is written in, once for all instruction sets.
//
// The contract (docs/contract.md) orders sums by sixteen lanes, so this is not a vector of whatever size a machine has:
// lane i of Floats is lane i of the contract, and each operation on it is one correctly rounded IEEE operation in each
// lane. A machine provides its own vector type and the operations on that; Floats is as many of them as make sixteen.
//
// Everything is in an unnamed namespace on purpose: this header is compiled with different instruction sets, and an
// ordinary inline function would be merged into one copy that an older CPU may not be able to run.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "bitcore/base/float_types-inl.h"

namespace bitlayers {
namespace {

inline constexpr int kLanes = 16;

/// a * b + c, rounded once, where the CPU has no such instruction: the product is exact in float64; the sum is rounded
/// to odd there (its error decides the last bit), after which rounding to float32 cannot go wrong.
inline float fused_multiply_add(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
  const double sum = product + addend;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (addend - back);  // two-sum: sum + error is exact
  std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
  if (error != 0 && std::isfinite(sum) && (bits & 1) == 0) {
    // Between sum and its neighbour on the side of the error lies the exact value: the odd one of both stands for it.
    const bool away = (error > 0) == (sum > 0);
    bits += away ? 1 : std::uint64_t(-1);
  }
  return static_cast<float>(std::bit_cast<double>(bits));
}

// ---- what a machine provides: a vector of floats, one of as many int32, and operations on them --------------------

#if defined(__AVX512F__)

struct Native {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F all(float a) { return _mm512_set1_ps(a); }
  static I all(std::int32_t a) { return _mm512_set1_epi32(a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F floats(I a) { return _mm512_castsi512_ps(a); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int kCount>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, kCount);
  }
  static I less(F a, F b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }
  static I unordered(F a, F b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)); }
  static I less(I a, I b) { return _mm512_movm_epi32(_mm512_cmplt_epi32_mask(a, b)); }
  static F from_float16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_bfloat16(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F from_int8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_float16(F a, std::uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

#elif defined(__AVX2__)

struct Native {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F all(float a) { return _mm256_set1_ps(a); }
  static I all(std::int32_t a) { return _mm256_set1_epi32(a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F floats(I a) { return _mm256_castsi256_ps(a); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int kCount>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, kCount);
  }
  static I less(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static I unordered(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
  static I less(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
  static F from_float16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F from_bfloat16(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F from_int8(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_float16(F a, std::uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

#elif defined(__aarch64__)

struct Native {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int kLanes = 4;
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F a) { vst1q_f32(p, a); }
  static F all(float a) { return vdupq_n_f32(a); }
  static I all(std::int32_t a) { return vdupq_n_s32(a); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F sqrt(F a) { return vsqrtq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }
  static I to_int(F a) { return vcvtnq_s32_f32(a); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static I bits(F a) { return vreinterpretq_s32_f32(a); }
  static F floats(I a) { return vreinterpretq_f32_s32(a); }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static I sub(I a, I b) { return vsubq_s32(a, b); }
  static I bit_and(I a, I b) { return vandq_s32(a, b); }
  static I bit_or(I a, I b) { return vorrq_s32(a, b); }
  static I bit_xor(I a, I b) { return veorq_s32(a, b); }
  template <int kCount>
  static I shift_left(I a) {
    return vshlq_n_s32(a, kCount);
  }
  static I less(F a, F b) { return vreinterpretq_s32_u32(vcltq_f32(a, b)); }
  static I unordered(F a, F b) { return vreinterpretq_s32_u32(vmvnq_u32(vandq_u32(vceqq_f32(a, a), vceqq_f32(b, b)))); }
  static I less(I a, I b) { return vreinterpretq_s32_u32(vcltq_s32(a, b)); }
  static F from_float16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F from_bfloat16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static F from_int8(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static void to_float16(F a, std::uint16_t* p) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
};

#else

// Any CPU: four lanes that compilers know what to do with, and element by element what they do not.
struct Native {
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  template <class Function>
  static F each(const Function& function) {
    return F{function(0), function(1), function(2), function(3)};
  }
  static F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F all(float a) { return F{a, a, a, a}; }
  static I all(std::int32_t a) { return I{a, a, a, a}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) {
    return each([&](int i) { return fused_multiply_add(a[i], b[i], c[i]); });
  }
  static F sqrt(F a) {
    return each([&](int i) { return std::sqrt(a[i]); });
  }
  // Adding 1.5 * 2^23 leaves no bits for a fraction; larger values have none.
  static F round(F a) {
    return each([&](int i) {
      const float magnitude = std::fabs(a[i]);
      const float rounded = (magnitude + 0x1p23f) - 0x1p23f;
      return magnitude < 0x1p23f ? std::copysign(rounded, a[i]) : a[i];
    });
  }
  static I to_int(F a) {
    const F r = round(a);
    return I{static_cast<std::int32_t>(r[0]), static_cast<std::int32_t>(r[1]), static_cast<std::int32_t>(r[2]),
             static_cast<std::int32_t>(r[3])};
  }
  static F to_float(I a) {
    return each([&](int i) { return static_cast<float>(a[i]); });
  }
  static I bits(F a) { return reinterpret_cast<I>(a); }
  static F floats(I a) { return reinterpret_cast<F>(a); }
  typedef std::uint32_t Unsigned __attribute__((vector_size(16)));  // wraps, as the vectors of every machine do
  static I add(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<Unsigned>(a) + reinterpret_cast<Unsigned>(b)); }
  static I sub(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<Unsigned>(a) - reinterpret_cast<Unsigned>(b)); }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_or(I a, I b) { return a | b; }
  static I bit_xor(I a, I b) { return a ^ b; }
  template <int kCount>
  static I shift_left(I a) {
    return a << kCount;
  }
  static I less(F a, F b) { return a < b; }
  static I unordered(F a, F b) { return (a != a) | (b != b); }
  static I less(I a, I b) { return a < b; }
  static F from_float16(const std::uint16_t* p) {
    return each([&](int i) { return bitcore::float16_to_float(p[i]); });
  }
  static F from_bfloat16(const std::uint16_t* p) {
    return each([&](int i) { return bitcore::bfloat16_to_float(p[i]); });
  }
  static F from_int8(const std::int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  static void to_float16(F a, std::uint16_t* p) {
    for (int i = 0; i < kLanes; ++i) p[i] = bitcore::float_to_float16(a[i]);
  }
};

#endif

// ---- sixteen lanes ------------------------------------------------------------------------------------------------

inline constexpr int kParts = kLanes / Native::kLanes;

struct Floats {
  Native::F part[kParts];
};
struct Ints {
  Native::I part[kParts];
};

// One operation of the machine on each part.
template <class Result, class Operation, class... Vectors>
[[gnu::always_inline]] inline Result on_parts(const Operation& operation, const Vectors&... vectors) {
  Result result;
  for (int i = 0; i < kParts; ++i) result.part[i] = operation(vectors.part[i]...);
  return result;
}
#define BITLAYERS_VECTOR_OPERATION(Result, name, operation, Argument)                      \
  [[gnu::always_inline]] inline Result name(const Argument& a, const Argument& b) {        \
    return on_parts<Result>([](auto x, auto y) { return Native::operation(x, y); }, a, b); \
  }
BITLAYERS_VECTOR_OPERATION(Floats, operator+, add, Floats)
BITLAYERS_VECTOR_OPERATION(Floats, operator-, sub, Floats)
BITLAYERS_VECTOR_OPERATION(Floats, operator*, mul, Floats)
BITLAYERS_VECTOR_OPERATION(Floats, operator/, div, Floats)
BITLAYERS_VECTOR_OPERATION(Ints, operator+, add, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, operator-, sub, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, operator&, bit_and, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, operator|, bit_or, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, operator^, bit_xor, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, operator<, less, Floats)  // all bits of a lane where it is true
BITLAYERS_VECTOR_OPERATION(Ints, operator<, less, Ints)
BITLAYERS_VECTOR_OPERATION(Ints, unordered, unordered, Floats)  // where one of both is NaN
#undef BITLAYERS_VECTOR_OPERATION

[[gnu::always_inline]] inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return on_parts<Floats>([](auto x, auto y, auto z) { return Native::fma(x, y, z); }, a, b, c);
}
[[gnu::always_inline]] inline Floats sqrt(const Floats& a) {
  return on_parts<Floats>([](auto x) { return Native::sqrt(x); }, a);
}
/// To the nearest integer, ties to even.
[[gnu::always_inline]] inline Floats round(const Floats& a) {
  return on_parts<Floats>([](auto x) { return Native::round(x); }, a);
}
/// The same as int32; for magnitudes below 2^31.
[[gnu::always_inline]] inline Ints to_int(const Floats& a) {
  return on_parts<Ints>([](auto x) { return Native::to_int(x); }, a);
}
[[gnu::always_inline]] inline Floats to_float(const Ints& a) {
  return on_parts<Floats>([](auto x) { return Native::to_float(x); }, a);
}
[[gnu::always_inline]] inline Ints bits(const Floats& a) {
  return on_parts<Ints>([](auto x) { return Native::bits(x); }, a);
}
[[gnu::always_inline]] inline Floats floats(const Ints& a) {
  return on_parts<Floats>([](auto x) { return Native::floats(x); }, a);
}
template <int kCount>
[[gnu::always_inline]] inline Ints shift_left(const Ints& a) {
  return on_parts<Ints>([](auto x) { return Native::template shift_left<kCount>(x); }, a);
}

[[gnu::always_inline]] inline Floats all(float a) {
  Floats result;
  for (auto& part : result.part) part = Native::all(a);
  return result;
}
[[gnu::always_inline]] inline Ints all(std::int32_t a) {
  Ints result;
  for (auto& part : result.part) part = Native::all(a);
  return result;
}

/// yes where the mask has all bits of a lane, no where it has none.
[[gnu::always_inline]] inline Ints select(const Ints& mask, const Ints& yes, const Ints& no) {
  return no ^ (mask & (no ^ yes));
}
[[gnu::always_inline]] inline Floats select(const Ints& mask, const Floats& yes, const Floats& no) {
  return floats(select(mask, bits(yes), bits(no)));
}
[[gnu::always_inline]] inline Floats abs(const Floats& a) { return floats(bits(a) & all(0x7fffffff)); }

/// The larger one; NaN where one of both is NaN.
[[gnu::always_inline]] inline Floats max_or_nan(const Floats& a, const Floats& b) {
  return select(unordered(a, b), a + b, select(a < b, b, a));
}

// ---- memory -------------------------------------------------------------------------------------------------------

template <class Element, class Load>
[[gnu::always_inline]] inline Floats load_parts(const Element* p, const Load& load) {
  Floats result;
  for (int i = 0; i < kParts; ++i) result.part[i] = load(p + i * Native::kLanes);
  return result;
}
[[gnu::always_inline]] inline Floats load(const float* p) {
  return load_parts(p, [](const float* q) { return Native::load(q); });
}
[[gnu::always_inline]] inline Floats load_float16(const std::uint16_t* p) {
  return load_parts(p, [](const std::uint16_t* q) { return Native::from_float16(q); });
}
[[gnu::always_inline]] inline Floats load_int8(const std::int8_t* p) {
  return load_parts(p, [](const std::int8_t* q) { return Native::from_int8(q); });
}
[[gnu::always_inline]] inline void store(float* p, const Floats& a) {
  for (int i = 0; i < kParts; ++i) Native::store(p + i * Native::kLanes, a.part[i]);
}
/// Rounded to nearest, ties to even.
[[gnu::always_inline]] inline void store_float16(std::uint16_t* p, const Floats& a) {
  for (int i = 0; i < kParts; ++i) Native::to_float16(a.part[i], p + i * Native::kLanes);
}

/// The first `count` < 16 elements, then zeros; nothing is read beyond them.
template <class Element>
inline void copy_first(const Element* p, std::int64_t count, Element (&sixteen)[kLanes]) {
  std::memset(sixteen, 0, sizeof sixteen);
  std::memcpy(sixteen, p, static_cast<std::size_t>(count) * sizeof(Element));
}
inline Floats load_first(const float* p, std::int64_t count) {
  float sixteen[kLanes];
  copy_first(p, count, sixteen);
  return load(sixteen);
}
inline void store_first(float* p, std::int64_t count, const Floats& a) {
  float sixteen[kLanes];
  store(sixteen, a);
  std::memcpy(p, sixteen, static_cast<std::size_t>(count) * sizeof(float));
}

/// All bits in the first `count` lanes, none in the others.
inline Ints first_lanes(std::int64_t count) {
  float numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(i);
  return load(numbers) < all(static_cast<float>(count));
}

// ---- the contract's sum -------------------------------------------------------------------------------------------

/// Lanes fold 16 to 8, 4, 2, 1: l + l+8, then l + l+4, l + l+2, l + l+1.
[[gnu::always_inline]] inline float fold(const Floats& a) {
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#elif defined(__AVX2__)
  const __m256 eight = _mm256_add_ps(a.part[0], a.part[1]);
#endif
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lanes[kLanes];
  store(lanes, a);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

/// dot(a, b): element i goes to lane i mod 16, each lane is fma(a_i, b_i, lane) in order, from 0.
inline float dot(const float* a, const float* b, std::int64_t count) {
  Floats lanes = all(0.0f);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes = fma(load(a + i), load(b + i), lanes);
  if (const std::int64_t left = count - i; left > 0) {
    lanes = select(first_lanes(left), fma(load_first(a + i, left), load_first(b + i, left), lanes), lanes);
  }
  return fold(lanes);
}

}  // namespace
}  // namespace bitlayers
