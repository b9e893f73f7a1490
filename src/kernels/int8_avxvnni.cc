// int8 activations with AVX-VNNI: vpdpbusd multiplies 32 codes by 32 activations and adds groups of four to int32.
//
// CPU features: AVX2, FMA, AVX-VNNI. Packer, layout of panel and tokens: int8_avx2-inl.h. Sums are exact in int32
// (wrapping ones cancel), for any k.
//
// The same instruction exists in two encodings: VEX (AVX-VNNI), which the library uses, and EVEX (AVX-512 VNNI and VL).
// int8_avxvnni_evex.cc compiles this file a second time, for the EVEX one: tests and benchmarks run it on CPUs with
// AVX-512 VNNI that lack AVX-VNNI.
#include "kernels/base3_recode-inl.h"
#include "kernels/builtin.h"
#include "kernels/int8_avx2-inl.h"
#include "quantize-inl.h"

namespace bitcore {

#ifdef BITCORE_EVEX
#define BITCORE_DPBUSD _mm256_dpbusd_epi32
#define BITCORE_TILES kInt8AvxVnniEvexTiles
#else
#define BITCORE_DPBUSD _mm256_dpbusd_avx_epi32
#define BITCORE_TILES kInt8AvxVnniTiles
#endif

namespace {

// 6 tokens x 2 registers of sums, 2 of weights and one broadcast: 15 of 16 registers.
constexpr int kTokens = 6;
constexpr int kDirectTokens = 4;

// sums += codes * activations. The empty statement ties the sum to one register: GCC 12 copies sums around without it.
void multiply_add(__m256i& sums, __m256i codes, __m256i activations) {
  sums = BITCORE_DPBUSD(sums, codes, activations);
  asm("" : "+x"(sums));
}

__m256i load_sums(const std::int32_t* sums) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(sums)); }

void keep_sums(std::int32_t* out, __m256i sums) { _mm256_store_si256(reinterpret_cast<__m256i*>(out), sums); }

// Calls itself down to `tokens`.
template <int Tokens>
void gemm_tokens(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t tokens, std::int64_t k_count,
                 std::int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return gemm_tokens<Tokens - 1>(weights, x, tokens, k_count, sums);
  }
  __m256i acc[Tokens][kHalves];
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) {
    acc[m][0] = load_sums(sums + m * kRows);
    acc[m][1] = load_sums(sums + m * kRows + kLanes);
  }
  for (std::int64_t k = 0; k < k_count; k += 4, weights += kRows * 4, x += Tokens * 4) {
    const __m256i first = load(weights);
    const __m256i second = load(weights + kLanes * 4);
#pragma GCC unroll 6
    for (int m = 0; m < Tokens; ++m) {
      const __m256i activations = broadcast_word(x + 4 * m);
      multiply_add(acc[m][0], first, activations);
      multiply_add(acc[m][1], second, activations);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) {
    keep_sums(sums + m * kRows, acc[m][0]);
    keep_sums(sums + m * kRows + kLanes, acc[m][1]);
  }
}

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums) {
  gemm_tokens<kTokens>(static_cast<const std::uint8_t*>(panel), static_cast<const std::uint8_t*>(packed_tokens), tokens,
                       k_count, static_cast<std::int32_t*>(sums));
}

// Field `Field` of one step, times all tokens. Neighbouring fields use different sums where there are any: vpdpbusd
// takes four or five cycles, and one token would wait for its own sum.
template <int Field, int Tokens, int Chains>
void multiply_field(__m256i (&acc)[Tokens][kHalves][Chains], __m256i first, __m256i second, const std::uint8_t* x) {
  const __m256i first_codes = field_codes<Field>(first);
  const __m256i second_codes = field_codes<Field>(second);
#pragma GCC unroll 4
  for (int m = 0; m < Tokens; ++m) {
    const __m256i activations = broadcast_word(x + 4 * (Field * Tokens + m));
    multiply_add(acc[m][0][Field % Chains], first_codes, activations);
    multiply_add(acc[m][1][Field % Chains], second_codes, activations);
  }
}

// sums += all chains.
template <int Chains>
void add_chains(const __m256i (&chains)[Chains], std::int32_t* sums) {
  __m256i total = load_sums(sums);
#pragma GCC unroll 4
  for (int c = 0; c < Chains; ++c) total = _mm256_add_epi32(total, chains[c]);
  keep_sums(sums, total);
}

// Calls itself down to `tokens`.
template <int Tokens>
std::uint32_t direct_tokens(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                            std::int64_t tokens, std::int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return direct_tokens<Tokens - 1>(tile, rows, steps, x, tokens, sums);
  }
  constexpr int kChains = Tokens <= 2 ? 4 / Tokens : 1;  // 6 to 8 registers of sums
  __m256i acc[Tokens][kHalves][kChains] = {};
  __m256i invalid[kHalves] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (std::int64_t step = 0; step < steps; ++step, tile += rows * 4, x += kStepCodes * Tokens) {
    const __m256i first = load_half(tile, 0);
    const __m256i second = load_half(tile, 1);
    invalid[0] = collect_invalid(invalid[0], first);
    invalid[1] = collect_invalid(invalid[1], second);
    multiply_field<0>(acc, first, second, x);
    multiply_field<1>(acc, first, second, x);
    multiply_field<2>(acc, first, second, x);
    multiply_field<3>(acc, first, second, x);
  }
#pragma GCC unroll 4
  for (int m = 0; m < Tokens; ++m) {
    add_chains(acc[m][0], sums + m * kTileRows);
    add_chains(acc[m][1], sums + m * kTileRows + kLanes);
  }
  return any_invalid(invalid[0], lane_mask(rows, 0)) | any_invalid(invalid[1], lane_mask(rows, 1));
}

std::uint32_t direct(const std::uint8_t* tile, std::int64_t, std::int64_t tile_rows, std::int64_t steps,
                     const void* packed_tokens, std::int64_t tokens, void* sums) {
  return direct_tokens<kDirectTokens>(tile, tile_rows, steps, static_cast<const std::uint8_t*>(packed_tokens), tokens,
                                      static_cast<std::int32_t*>(sums));
}

}  // namespace

constinit const TileFunctions BITCORE_TILES = {
    .activation_dtype = ActivationDtype::int8,
    .panel_rows = kRows,
    .token_tile = kTokens,
    .k_block = kBlock,
    .direct_tokens = kDirectTokens,
    .panel_element = 1,
    .token_element = 1,
    .offset_codes = true,
    .absmax = absmax_bits,
    .quantize = quantize_x_row,
    .pack_tokens = pack_token_words,
    .unpack_panel = unpack_panel,
    .gemm = gemm,
    .direct = direct,
    .store = store_sums<std::int32_t>,
    .base3_recode = recode_base3,
};

}  // namespace bitcore
