// int8 activations with AVX-VNNI: vpdpbusd multiplies 32 codes by 32 activations and adds groups of four to int32.
//
// CPU features: AVX2, FMA, AVX-VNNI. Packer, layouts, layout of panel and tokens: int8_avx2-inl.h.
//
// The same instruction exists in two encodings: VEX (AVX-VNNI), which the library uses, and EVEX (AVX-512 VNNI and VL).
// int8_avxvnni_evex.cc compiles this file a second time, for the EVEX one: tests and benchmarks run it on CPUs with
// AVX-512 VNNI that lack AVX-VNNI.
#include "bitcore/kernels/int8_avx2-inl.h"

namespace bitcore {

#ifdef BITCORE_EVEX
#define BITCORE_DPBUSD _mm256_dpbusd_epi32
#define BITCORE_TILES kInt8AvxVnniEvexTiles
#else
#define BITCORE_DPBUSD _mm256_dpbusd_avx_epi32
#define BITCORE_TILES kInt8AvxVnniTiles
#endif

namespace {

// Sums of groups of four in int32.
struct Quads {
  // A group adds at most 4 * 2 * 128 = 1,024 in magnitude: 2^21 of them reach -2^31.
  static constexpr std::int64_t kFoldGroups = std::int64_t{1} << 21;

  // Most sums do not fit the 16 registers then; each is one operand in memory, which still beats unpacking.
  static constexpr int kDirectTokens = 12;

  // vpdpbusd takes four or five cycles: one or two tokens would wait for their own sums.
  static constexpr int direct_sums(int tokens) { return tokens <= 2 ? 2 : 1; }

  // The empty statement ties the sum to one register: GCC 12 copies sums around without it.
  static void multiply_add(__m256i& sums, __m256i codes, __m256i activations) {
    sums = BITCORE_DPBUSD(sums, codes, activations);
    asm("" : "+x"(sums));
  }

  static __m256i rows(__m256i sums) { return sums; }
};

}  // namespace

constinit const TileFunctions BITCORE_TILES = avx2_tiles<Quads>();

}  // namespace bitcore
