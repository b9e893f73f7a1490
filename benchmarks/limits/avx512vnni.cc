// vpdpbusd of AVX-512 VNNI, with 512 and with 256 bits.
#include <immintrin.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

constexpr int kSums = 24;  // as many as the kernels keep

void dpbusd_zmm_rounds(std::int64_t rounds) {
  __m512i sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_si512();
  const __m512i codes = _mm512_set1_epi8(1);
  const __m512i activations = _mm512_set1_epi8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], codes, activations);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

void dpbusd_ymm_rounds(std::int64_t rounds) {
  __m256i sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
  const __m256i codes = _mm256_set1_epi8(1);
  const __m256i activations = _mm256_set1_epi8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm256_dpbusd_epi32(sums[i], codes, activations);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kDpbusdZmm = {kSums * 64, dpbusd_zmm_rounds};
constinit const Loop kDpbusdYmm = {kSums * 32, dpbusd_ymm_rounds};

}  // namespace bitcore::limits
