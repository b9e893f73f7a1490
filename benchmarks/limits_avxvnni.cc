#include <immintrin.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct YmmVnni {
  using Vector = __m256i;
  static constexpr int kMultiplyAdds = 32;
  static Vector zero() { return _mm256_setzero_si256(); }
  static void multiply_add(Vector& sum) {
    sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), _mm256_set1_epi8(3));
    asm volatile("" : "+x"(sum));
  }
};

}  // namespace

std::int64_t avx_vnni_multiply_adds(std::int64_t rounds) { return multiply_adds<YmmVnni, 12>(rounds); }

}  // namespace bitcore::benchmarks
