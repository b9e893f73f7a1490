#include <arm_neon.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct Smlal {
  using Vector = int16x8_t;
  static constexpr int kMultiplyAdds = 8;
  static Vector zero() { return vdupq_n_s16(0); }
  static void multiply_add(Vector& sum) {
    // By assembler: the compiler would multiply the constants once.
    asm volatile("smlal %0.8h, %1.8b, %2.8b" : "+w"(sum) : "w"(vdup_n_s8(1)), "w"(vdup_n_s8(3)));
  }
};

struct Fma {
  using Vector = float32x4_t;
  static constexpr int kMultiplyAdds = 4;
  static Vector zero() { return vdupq_n_f32(0.0f); }
  static void multiply_add(Vector& sum) {
    sum = vfmaq_f32(sum, vdupq_n_f32(1.0f), vdupq_n_f32(0.5f));
    asm volatile("" : "+w"(sum));
  }
};

}  // namespace

std::int64_t neon_smlal_multiply_adds(std::int64_t rounds) { return multiply_adds<Smlal, 24>(rounds); }

std::int64_t neon_fma_multiply_adds(std::int64_t rounds) { return multiply_adds<Fma, 24>(rounds); }

}  // namespace bitcore::benchmarks
