// Fused multiply-adds of AVX-512 F.
#include <immintrin.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

constexpr int kSums = 24;  // as many as the kernels keep

void fma_rounds(std::int64_t rounds) {
  __m512 sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
  const __m512 weights = _mm512_set1_ps(1.0f);
  const __m512 activations = _mm512_set1_ps(0.5f);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_fmadd_ps(weights, activations, sums[i]);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kFmaZmm = {kSums * 16, fma_rounds};

}  // namespace bitcore::limits
