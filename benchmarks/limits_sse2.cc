// What every x86-64 CPU has: the instructions that compilers make of the portable kernels.
#include <immintrin.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

// The products come by assembler: the compiler would multiply once.

struct Madd {
  using Vector = __m128i;
  static constexpr int kMultiplyAdds = 8;
  static Vector zero() { return _mm_setzero_si128(); }
  static void multiply_add(Vector& sum) {
    __m128i products = _mm_set1_epi16(3);
    asm volatile("pmaddwd %1, %0" : "+x"(products) : "x"(_mm_set1_epi16(1)));
    sum = _mm_add_epi32(sum, products);
    asm volatile("" : "+x"(sum));
  }
};

struct MultiplyAdd {
  using Vector = __m128;
  static constexpr int kMultiplyAdds = 4;
  static Vector zero() { return _mm_setzero_ps(); }
  static void multiply_add(Vector& sum) {
    __m128 products = _mm_set1_ps(0.5f);
    asm volatile("mulps %1, %0" : "+x"(products) : "x"(_mm_set1_ps(1.0f)));
    sum = _mm_add_ps(sum, products);
    asm volatile("" : "+x"(sum));
  }
};

}  // namespace

std::int64_t sse2_madd_multiply_adds(std::int64_t rounds) { return multiply_adds<Madd, 8>(rounds); }

std::int64_t sse2_float_multiply_adds(std::int64_t rounds) { return multiply_adds<MultiplyAdd, 8>(rounds); }

}  // namespace bitcore::benchmarks
