#include <arm_neon.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct Smlal {
  using Vector = int16x8_t;
  static constexpr int kMultiplyAdds = 8;
  static Vector zero() { return vdupq_n_s16(0); }
  static void multiply_add(Vector& sum) {
    sum = vmlal_s8(sum, vdup_n_s8(1), vdup_n_s8(3));
    asm volatile("" : "+w"(sum));
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
