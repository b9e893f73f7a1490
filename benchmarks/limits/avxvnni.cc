// vpdpbusd of AVX-VNNI, 256 bits.
#include <immintrin.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

constexpr int kSums = 12;  // of 16 registers

void dpbusd_rounds(std::int64_t rounds) {
  __m256i sums[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
  const __m256i codes = _mm256_set1_epi8(1);
  const __m256i activations = _mm256_set1_epi8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm256_dpbusd_avx_epi32(sums[i], codes, activations);
      asm volatile("" : "+x"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kAvxVnniDpbusdYmm = {kSums * 32, dpbusd_rounds};

}  // namespace bitcore::limits
