// Multiply-adds of AVX2 and FMA.
#include <immintrin.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

// 10 sums, one product and the operands fit 16 registers; 4 to 5 cycles of latency at 2 a cycle need no more.
constexpr int kSums = 10;

void maddubs_rounds(std::int64_t rounds) {
  __m256i sums[kSums];
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
  __m256i codes = _mm256_set1_epi8(1);
  const __m256i activations = _mm256_set1_epi8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : "+x"(codes));  // unknown: the product is not hoisted
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(codes, activations));
      asm volatile("" : "+x"(sums[i]));
    }
  }
}

void fma_rounds(std::int64_t rounds) {
  __m256 sums[kSums];
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_ps();
  const __m256 weights = _mm256_set1_ps(1.0f);
  const __m256 activations = _mm256_set1_ps(0.5f);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm256_fmadd_ps(weights, activations, sums[i]);
      asm volatile("" : "+x"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kMaddubsYmm = {kSums * 32, maddubs_rounds};
constinit const Loop kFmaYmm = {kSums * 8, fma_rounds};

}  // namespace bitcore::limits
