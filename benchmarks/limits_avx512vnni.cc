#include <immintrin.h>

#include "limits.h"

namespace bitcore::benchmarks {

bool has_vnni() { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"); }

std::int64_t vnni_multiply_adds(std::int64_t rounds) {
  constexpr int kSums = 24;  // as many as the kernels keep
  __m512i sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_epi32(i);
  const __m512i codes = _mm512_set1_epi8(1);
  const __m512i activations = _mm512_set1_epi8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], codes, activations);
      asm volatile("" : "+v"(sums[i]));
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    asm volatile("" : : "v"(sums[i]));
  }
  return rounds * kSums * 64;
}

}  // namespace bitcore::benchmarks
