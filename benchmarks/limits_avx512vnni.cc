#include <immintrin.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct ZmmVnni {
  using Vector = __m512i;
  static constexpr int kMultiplyAdds = 64;
  static Vector zero() { return _mm512_setzero_si512(); }
  static void multiply_add(Vector& sum) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_set1_epi8(3));
    asm volatile("" : "+v"(sum));
  }
};

struct YmmVnni {
  using Vector = __m256i;
  static constexpr int kMultiplyAdds = 32;
  static Vector zero() { return _mm256_setzero_si256(); }
  static void multiply_add(Vector& sum) {
    sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), _mm256_set1_epi8(3));
    asm volatile("" : "+v"(sum));
  }
};

}  // namespace

std::int64_t avx512_vnni_multiply_adds(std::int64_t rounds) { return multiply_adds<ZmmVnni, 24>(rounds); }

std::int64_t evex_vnni_multiply_adds(std::int64_t rounds) { return multiply_adds<YmmVnni, 12>(rounds); }

}  // namespace bitcore::benchmarks
