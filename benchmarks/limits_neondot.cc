#include <arm_neon.h>

#include "limits-inl.h"

namespace bitcore::benchmarks {
namespace {

struct Sdot {
  using Vector = int32x4_t;
  static constexpr int kMultiplyAdds = 16;
  static Vector zero() { return vdupq_n_s32(0); }
  static void multiply_add(Vector& sum) {
    sum = vdotq_s32(sum, vdupq_n_s8(1), vdupq_n_s8(3));
    asm volatile("" : "+w"(sum));
  }
};

}  // namespace

std::int64_t neon_dot_multiply_adds(std::int64_t rounds) { return multiply_adds<Sdot, 20>(rounds); }

}  // namespace bitcore::benchmarks
