// sdot of ARM64's dot product extension.
#include <arm_neon.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

constexpr int kSums = 20;  // as many as the kernel keeps

void sdot_rounds(std::int64_t rounds) {
  int32x4_t sums[kSums];
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_s32(0);
  const int8x16_t codes = vdupq_n_s8(1);
  const int8x16_t activations = vdupq_n_s8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 20
    for (int i = 0; i < kSums; ++i) {
      sums[i] = vdotq_s32(sums[i], codes, activations);
      asm volatile("" : "+w"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kSdot = {kSums * 16, sdot_rounds};

}  // namespace bitcore::limits
