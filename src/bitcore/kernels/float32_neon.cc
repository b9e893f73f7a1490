// float32 activations with NEON.
//
// CPU feature: NEON (every ARM64 CPU). Layout, order of the sums, bounds: float32_tiles-inl.h.
#include <arm_neon.h>

#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Neon {
  using Vector = float32x4_t;
  using Words = uint32x4_t;
  static constexpr int kLanes = 4;

  static Vector load(const float* values) { return vld1q_f32(values); }
  static void store(float* out, Vector values) { vst1q_f32(out, values); }
  static Vector broadcast(float value) { return vdupq_n_f32(value); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    acc = vfmaq_f32(acc, a, b);
    asm("" : "+w"(acc));  // keeps GCC 12 from copying the sums around
  }

  static Words load_words(const std::uint8_t* bytes) { return vreinterpretq_u32_u8(vld1q_u8(bytes)); }
  static void store_words(std::uint32_t* out, Words words) { vst1q_u32(out, words); }
  static Words or_adjacent(Words a, Words b) { return vorrq_u32(a, vandq_u32(b, vshrq_n_u32(b, 1))); }

  template <int Shift>
  static Vector weights(Words words) {
    Words shifted = words;
    if constexpr (Shift > 0) shifted = vshrq_n_u32(shifted, Shift);
    const int32x4_t codes = vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(3)));
    return vcvtq_f32_s32(vsubq_s32(codes, vdupq_n_s32(1)));
  }
};

// 16 sums: 4 registers of a tile for up to 4 tokens, and as many of words and of weights.
using Direct = Float32Direct<Neon, /*Tokens=*/8, /*Sums=*/16>;
// 5 tokens x 4 registers of sums, 4 of weights and 5 of activations: 29 of 32 registers (with 6 GCC 12 spills).
// 16 rows x 256 x 4 bytes = 16 KiB: half of a common L1 cache.
using Panels = Float32Panels<Neon, /*Vectors=*/4, /*Tokens=*/5, /*Block=*/256>;

}  // namespace

constinit const TileFunctions kFloat32NeonTiles = Panels::added_to(Direct::table());

}  // namespace bitcore
