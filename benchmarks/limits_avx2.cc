#include <immintrin.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct Maddubs {
  using Vector = __m256i;
  static constexpr int kMultiplyAdds = 32;
  static Vector zero() { return _mm256_setzero_si256(); }
  static void multiply_add(Vector& sum) {
    __m256i products;  // by assembler: the compiler would multiply once
    asm volatile("vpmaddubsw %1, %1, %0" : "=x"(products) : "x"(_mm256_set1_epi8(3)));
    sum = _mm256_add_epi16(sum, products);
    asm volatile("" : "+x"(sum));
  }
};

struct Fma {
  using Vector = __m256;
  static constexpr int kMultiplyAdds = 8;
  static Vector zero() { return _mm256_setzero_ps(); }
  static void multiply_add(Vector& sum) {
    sum = _mm256_fmadd_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(0.5f), sum);
    asm volatile("" : "+x"(sum));
  }
};

}  // namespace

std::int64_t avx2_maddubs_multiply_adds(std::int64_t rounds) { return multiply_adds<Maddubs, 12>(rounds); }

std::int64_t avx2_fma_multiply_adds(std::int64_t rounds) { return multiply_adds<Fma, 12>(rounds); }

}  // namespace bitcore::benchmarks
