// int8 activations with AVX2: vpmaddubsw multiplies 32 codes by 32 activations and adds pairs to int16.
//
// CPU features: AVX2, FMA. Packer, layouts, layout of panel and tokens: int8_avx2-inl.h.
#include "bitcore/kernels/int8_avx2-inl.h"

namespace bitcore {
namespace {

// Sums of pairs in int16.
struct Pairs {
  // A pair adds at most 2 * 2 * 128 = 512 in magnitude, on the negative side only, 508 on the positive one: 64 pairs
  // reach -32,768 and 32,512 and fit int16.
  static constexpr std::int64_t kFoldGroups = 64;

  // Above it the sums that the 16 registers cannot hold cost more than unpacking does.
  static constexpr int kDirectTokens = 8;

  // One token: the odd groups apart, whose codes then need no shift. More need the registers.
  static constexpr int direct_sums(int tokens) { return tokens == 1 ? 2 : 1; }

  // The empty statement ties the sum to one register: GCC 12 copies sums around without it.
  static void multiply_add(__m256i& sums, __m256i codes, __m256i activations) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, activations));
    asm("" : "+x"(sums));
  }

  static __m256i rows(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

}  // namespace

constinit const TileFunctions kInt8Avx2Tiles = avx2_tiles<Pairs>();

}  // namespace bitcore
