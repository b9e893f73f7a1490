// int8 activations with AVX2: vpmaddubsw multiplies 32 codes by 32 activations and adds pairs to int16.
//
// CPU features: AVX2, FMA. Packer, layout of panel and tokens: int8_avx2-inl.h.
//
// Bound: a pair adds at most 2 * 2 * 128 = 512 in magnitude, on the negative side only, 508 on the positive one: 64
// pairs reach -32,768 and 32,512 and fit int16. After kFoldGroups groups the pairs are added to int32.
#include "kernels/base3_recode-inl.h"
#include "kernels/builtin.h"
#include "kernels/int8_avx2-inl.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

// 6 tokens x 2 registers of sums, 2 of weights, one broadcast and one product: all 16 registers.
constexpr int kTokens = 6;
constexpr int kDirectTokens = 4;
constexpr std::int64_t kFoldGroups = 64;
constexpr std::int64_t kFoldSteps = kFoldGroups / 4;

// pairs += codes * activations. The empty statement ties the sum to one register: GCC 12 copies sums around without it.
void multiply_add(__m256i& pairs, __m256i codes, __m256i activations) {
  pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, activations));
  asm("" : "+x"(pairs));
}

// sums += both pairs of each row.
void fold(std::int32_t* sums, __m256i pairs) {
  auto* out = reinterpret_cast<__m256i*>(sums);
  const __m256i rows = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  _mm256_store_si256(out, _mm256_add_epi32(_mm256_load_si256(out), rows));
}

// At most kFoldGroups groups of four k.
template <int Tokens>
void gemm_groups(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t groups, std::int32_t* sums) {
  __m256i pairs[Tokens][kHalves];
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
  for (std::int64_t group = 0; group < groups; ++group, weights += kRows * 4, x += Tokens * 4) {
    const __m256i first = load(weights);
    const __m256i second = load(weights + kLanes * 4);
#pragma GCC unroll 6
    for (int m = 0; m < Tokens; ++m) {
      const __m256i activations = broadcast_word(x + 4 * m);
      multiply_add(pairs[m][0], first, activations);
      multiply_add(pairs[m][1], second, activations);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) {
    fold(sums + m * kRows, pairs[m][0]);
    fold(sums + m * kRows + kLanes, pairs[m][1]);
  }
}

// Calls gemm_groups<tokens>.
template <int Tokens>
void gemm_tokens(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t tokens, std::int64_t k_count,
                 std::int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return gemm_tokens<Tokens - 1>(weights, x, tokens, k_count, sums);
  }
  const std::int64_t groups = k_count / 4;
  for (std::int64_t group = 0; group < groups; group += kFoldGroups) {
    const std::int64_t count = groups - group < kFoldGroups ? groups - group : kFoldGroups;
    gemm_groups<Tokens>(weights + group * kRows * 4, x + group * Tokens * 4, count, sums);
  }
}

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums) {
  gemm_tokens<kTokens>(static_cast<const std::uint8_t*>(panel), static_cast<const std::uint8_t*>(packed_tokens), tokens,
                       k_count, static_cast<std::int32_t*>(sums));
}

// One half of a tile times all tokens, at most kFoldSteps steps.
template <int Tokens>
__m256i direct_steps(const std::uint8_t* tile, std::int64_t rows, int half, std::int64_t steps, const std::uint8_t* x,
                     std::int32_t* sums, __m256i invalid) {
  __m256i pairs[Tokens];
#pragma GCC unroll 4
  for (int m = 0; m < Tokens; ++m) pairs[m] = _mm256_setzero_si256();
  for (std::int64_t step = 0; step < steps; ++step, tile += rows * 4, x += kStepCodes * Tokens) {
    const __m256i words = load_half(tile, half);
    invalid = collect_invalid(invalid, words);
    const __m256i codes[4] = {field_codes<0>(words), field_codes<1>(words), field_codes<2>(words),
                              field_codes<3>(words)};
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
#pragma GCC unroll 4
      for (int m = 0; m < Tokens; ++m) multiply_add(pairs[m], codes[f], broadcast_word(x + 4 * (f * Tokens + m)));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Tokens; ++m) fold(sums + m * kTileRows + half * kLanes, pairs[m]);
  return invalid;
}

// Calls direct_steps<tokens>.
template <int Tokens>
std::uint32_t direct_tokens(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                            std::int64_t tokens, std::int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return direct_tokens<Tokens - 1>(tile, rows, steps, x, tokens, sums);
  }
  __m256i invalid[kHalves] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (std::int64_t step = 0; step < steps; step += kFoldSteps) {
    const std::int64_t count = steps - step < kFoldSteps ? steps - step : kFoldSteps;
    const std::uint8_t* words = tile + step * rows * 4;
    const std::uint8_t* activations = x + step * kStepCodes * Tokens;
    invalid[0] = direct_steps<Tokens>(words, rows, 0, count, activations, sums, invalid[0]);
    invalid[1] = direct_steps<Tokens>(words, rows, 1, count, activations, sums, invalid[1]);
  }
  return any_invalid(invalid[0], lane_mask(rows, 0)) | any_invalid(invalid[1], lane_mask(rows, 1));
}

std::uint32_t direct(const std::uint8_t* tile, std::int64_t, std::int64_t tile_rows, std::int64_t steps,
                     const void* packed_tokens, std::int64_t tokens, void* sums) {
  return direct_tokens<kDirectTokens>(tile, tile_rows, steps, static_cast<const std::uint8_t*>(packed_tokens), tokens,
                                      static_cast<std::int32_t*>(sums));
}

}  // namespace

constinit const TileFunctions kInt8Avx2Tiles = {
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
