// int8 activations with AVX2: vpmaddubsw multiplies 32 codes by 32 activations and adds pairs to int16.
//
// Packer: standard 2-bit form. CPU features: AVX2, FMA. Half a step of a full tile is one register with an output row
// in each 32-bit lane. The code w + 1 is the unsigned operand; the driver starts every sum at minus the sum of the
// token's activations.
//
// Bound: a pair adds at most 2 * 2 * 128 = 512 in magnitude, on the negative side only, 508 on the positive one: 64
// pairs reach -32,768 and 32,512 and fit int16. After kFoldGroups groups the pairs are added to int32.
//
// Panel: [k / 4][16 rows] words of four codes; tokens: [k / 4][token] words of four activations.
#include <immintrin.h>

#include "kernels/builtin.h"
#include "kernels/int8_words-inl.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
constexpr int kLanes = 8;
constexpr int kHalves = 2;  // registers of a tile
// 6 tokens x 2 registers of sums, 2 of weights, one broadcast and one product: all 16 registers.
constexpr int kTokens = 6;
// 16 rows x 1,024 bytes = 16 KiB of weights and 6 x 1,024 = 6 KiB of activations share an L1 cache of 32 KiB.
constexpr std::int64_t kBlock = 1024;
constexpr int kDirectTokens = 4;
constexpr std::int64_t kFoldGroups = 64;
constexpr std::int64_t kFoldSteps = kFoldGroups / 4;

__m256i low_fields() { return _mm256_set1_epi8(0x03); }

__m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

__m256i broadcast_word(const void* activations) {
  std::int32_t word;
  std::memcpy(&word, activations, sizeof(word));
  return _mm256_set1_epi32(word);
}

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

// ORs codes that are 3 into `invalid`; bits between the fields are noise until any_invalid() drops them.
__m256i collect_invalid(__m256i invalid, __m256i words) {
  return _mm256_or_si256(invalid, _mm256_and_si256(words, _mm256_srli_epi32(words, 1)));
}

std::uint32_t any_invalid(__m256i invalid, __m256i lanes) {
  return _mm256_testz_si256(invalid, _mm256_and_si256(lanes, _mm256_set1_epi32(0x55555555))) ? 0u : 1u;
}

// All bits of the lanes of one half of a tile that hold rows.
__m256i lane_mask(std::int64_t rows, int half) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows) - half * kLanes), lanes);
}

// One half of a step. Where the tile has fewer than 16 rows the other lanes read what follows, in the end the trailer,
// which is long enough: their sums are never stored, their invalid codes are masked. (Masked loads would be exact, but
// ran at a quarter of the speed from memory.)
__m256i load_half(const std::uint8_t* step, int half) { return load(step + half * kLanes * 4); }

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  std::uint32_t invalid = 0;
  for (int half = 0; half < kHalves; ++half) {
    __m256i half_invalid = _mm256_setzero_si256();
    auto* out = static_cast<__m256i*>(panel) + half;
    for (std::int64_t step = step_begin; step < step_end; ++step, out += 4 * kHalves) {
      const __m256i words = load_half(tiles + step * rows * 4, half);
      half_invalid = collect_invalid(half_invalid, words);
      _mm256_store_si256(out, _mm256_and_si256(words, low_fields()));
      _mm256_store_si256(out + kHalves, _mm256_and_si256(_mm256_srli_epi32(words, 2), low_fields()));
      _mm256_store_si256(out + 2 * kHalves, _mm256_and_si256(_mm256_srli_epi32(words, 4), low_fields()));
      _mm256_store_si256(out + 3 * kHalves, _mm256_and_si256(_mm256_srli_epi32(words, 6), low_fields()));
    }
    invalid |= any_invalid(half_invalid, lane_mask(rows, half));
  }
  return invalid;
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
    const __m256i codes[4] = {_mm256_and_si256(words, low_fields()),
                              _mm256_and_si256(_mm256_srli_epi32(words, 2), low_fields()),
                              _mm256_and_si256(_mm256_srli_epi32(words, 4), low_fields()),
                              _mm256_and_si256(_mm256_srli_epi32(words, 6), low_fields())};
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
};

}  // namespace bitcore
