// Multiply-adds of the architecture's oldest CPU, as the portable kernels use them.
#include "benchmarks/limits/loops.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bitcore::limits {
namespace {

// With one operand and one product 8 sums leave registers free; 4 to 5 cycles of latency at 2 a cycle need no more
// than 10.
constexpr int kSums = 10;

// The empty statements make an operand unknown and a sum wanted: nothing is hoisted or left out.
#if defined(__SSE2__)
constexpr std::int64_t kInt16Lanes = 8;

void int16_rounds(std::int64_t rounds) {
  __m128i sums[kSums];
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) sums[i] = _mm_setzero_si128();
  __m128i codes = _mm_set1_epi16(1);
  const __m128i activations = _mm_set1_epi16(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : "+x"(codes));
      sums[i] = _mm_add_epi32(sums[i], _mm_madd_epi16(codes, activations));
      asm volatile("" : "+x"(sums[i]));
    }
  }
}
#elif defined(__aarch64__)
constexpr std::int64_t kInt16Lanes = 4;

void int16_rounds(std::int64_t rounds) {
  int32x4_t sums[kSums];
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_s32(0);
  const int16x4_t codes = vdup_n_s16(1);
  const int16x4_t activations = vdup_n_s16(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      sums[i] = vmlal_s16(sums[i], codes, activations);
      asm volatile("" : "+w"(sums[i]));
    }
  }
}
#else
constexpr std::int64_t kInt16Lanes = 1;

void int16_rounds(std::int64_t rounds) {
  std::int32_t sums[kSums] = {};
  std::int16_t code = 1;
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : "+r"(code));
      sums[i] += code * 3;
      asm volatile("" : "+r"(sums[i]));
    }
  }
}
#endif

#if defined(__aarch64__)
#define BITCORE_VECTOR_REGISTER "+w"
#elif defined(__SSE2__)
#define BITCORE_VECTOR_REGISTER "+x"
#else
#define BITCORE_VECTOR_REGISTER "+m"
#endif

typedef float Float4 __attribute__((vector_size(16)));

void float32_rounds(std::int64_t rounds) {
  Float4 sums[kSums];
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) sums[i] = Float4{};
  Float4 weights = {1.0f, 1.0f, 1.0f, 1.0f};
  const Float4 activations = {0.5f, 0.5f, 0.5f, 0.5f};
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : BITCORE_VECTOR_REGISTER(weights));
      sums[i] += weights * activations;
      asm volatile("" : BITCORE_VECTOR_REGISTER(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kInt16Baseline = {kSums * kInt16Lanes, int16_rounds};
constinit const Loop kFloat32Baseline = {kSums * 4, float32_rounds};

}  // namespace bitcore::limits
