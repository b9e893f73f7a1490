#include <immintrin.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct Fma {
  using Vector = __m512;
  static constexpr int kMultiplyAdds = 16;
  static Vector zero() { return _mm512_setzero_ps(); }
  static void multiply_add(Vector& sum) {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(0.5f), sum);
    asm volatile("" : "+v"(sum));
  }
};

}  // namespace

std::int64_t avx512_fma_multiply_adds(std::int64_t rounds) { return multiply_adds<Fma, 24>(rounds); }

}  // namespace bitcore::benchmarks
