// smlal and fmla of ARM64's NEON.
#include <arm_neon.h>

#include "benchmarks/limits/loops.h"

namespace bitcore::limits {
namespace {

constexpr int kSums = 24;  // of 32 registers

void smlal_rounds(std::int64_t rounds) {
  int16x8_t sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_s16(0);
  const int8x8_t codes = vdup_n_s8(1);
  const int8x8_t activations = vdup_n_s8(3);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      // By assembler: the compiler would multiply the constants once.
      asm volatile("smlal %0.8h, %1.8b, %2.8b" : "+w"(sums[i]) : "w"(codes), "w"(activations));
    }
  }
}

void fmla_rounds(std::int64_t rounds) {
  float32x4_t sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_f32(0.0f);
  const float32x4_t weight = vdupq_n_f32(1.0f);
  const float32x4_t activation = vdupq_n_f32(0.5f);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = vfmaq_f32(sums[i], weight, activation);
      asm volatile("" : "+w"(sums[i]));
    }
  }
}

}  // namespace

constinit const Loop kSmlal = {kSums * 8, smlal_rounds};
constinit const Loop kFmlaNeon = {kSums * 4, fmla_rounds};

}  // namespace bitcore::limits
