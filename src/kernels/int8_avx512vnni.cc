// int8 activations with AVX-512 VNNI: vpdpbusd multiplies 64 codes by 64 activations and adds groups of four.
//
// Packer: standard 2-bit form. CPU features: AVX-512 F, BW, DQ, VL, VNNI. A 64-byte step of a full tile is one register
// with an output row in each 32-bit lane, so that no sum crosses lanes. The code w + 1 is the unsigned operand; the
// driver starts every sum at minus the sum of the token's activations, which takes the 1 off again.
//
// Panel: [k / 4][32 rows] words of four codes; tokens: [k / 4][token] words of four activations.
#include <immintrin.h>

#include "kernels/builtin.h"
#include "kernels/int8_words-inl.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = 2 * kTileRows;
// 12 tokens x 2 registers of sums, 2 of weights and some for broadcasts fill the 32 registers.
constexpr int kTokens = 12;
// 32 rows x 512 bytes = 16 KiB of weights and 12 x 512 = 6 KiB of activations share an L1 cache of 32 KiB.
constexpr std::int64_t kBlock = 512;
constexpr int kDirectTokens = 12;
// Up to this many tokens the four fields keep a register of sums each, which saves shifting the weights.
constexpr int kFieldSumTokens = 4;
// Steps after which the fields' sums are folded: the one that is worth 64 times its value reaches
// 64 * 2 * 128 * 4 * steps, below 2^31 up to 32,767 steps.
constexpr std::int64_t kFoldSteps = 16384;

__m512i low_fields() { return _mm512_set1_epi8(0x03); }

__m512i load_step(const std::uint8_t* words, __mmask16 rows) { return _mm512_maskz_loadu_epi32(rows, words); }

// acc += codes * activations. The empty statement ties the sum to one register: without it GCC 12 copies sums around
// and spills some of them.
void multiply_add(__m512i& acc, __m512i codes, __m512i activations) {
  acc = _mm512_dpbusd_epi32(acc, codes, activations);
  asm("" : "+v"(acc));
}

// ORs codes that are 3 into `invalid`; bits between the fields are noise until any_invalid() drops them.
__m512i collect_invalid(__m512i invalid, __m512i words) {
  return _mm512_or_si512(invalid, _mm512_and_si512(words, _mm512_srli_epi32(words, 1)));
}

std::uint32_t any_invalid(__m512i invalid) {
  return static_cast<std::uint32_t>(_mm512_reduce_or_epi32(invalid)) & 0x55555555u;
}

__mmask16 row_mask(std::int64_t rows) { return static_cast<__mmask16>((1u << rows) - 1u); }

__m512i broadcast_word(const void* activations) {
  std::int32_t word;
  std::memcpy(&word, activations, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Unpacks one tile into its half of the panel.
__m512i unpack_tile(const std::uint8_t* tile, std::int64_t rows, std::int64_t step_begin, std::int64_t step_end,
                    std::uint8_t* panel, __m512i invalid) {
  const __mmask16 mask = row_mask(rows);
  const __m512i low = low_fields();
  for (std::int64_t step = step_begin; step < step_end; ++step, panel += 4 * kRows * 4) {
    const __m512i words = load_step(tile + step * rows * 4, mask);
    invalid = collect_invalid(invalid, words);
    _mm512_store_si512(panel, _mm512_and_si512(words, low));
    _mm512_store_si512(panel + kRows * 4, _mm512_and_si512(_mm512_srli_epi32(words, 2), low));
    _mm512_store_si512(panel + 2 * kRows * 4, _mm512_and_si512(_mm512_srli_epi32(words, 4), low));
    _mm512_store_si512(panel + 3 * kRows * 4, _mm512_and_si512(_mm512_srli_epi32(words, 6), low));
  }
  return invalid;
}

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                           std::int64_t step_begin, std::int64_t step_end, void* panel) {
  auto* out = static_cast<std::uint8_t*>(panel);
  const std::int64_t first_rows = rows < kTileRows ? rows : kTileRows;
  __m512i invalid = _mm512_setzero_si512();
  invalid = unpack_tile(tiles, first_rows, step_begin, step_end, out, invalid);
  // A missing second tile is read as the first one again: its sums are never stored.
  const bool two = rows > kTileRows;
  const std::uint8_t* second = two ? tiles + kTileRows * payload_row_bytes : tiles;
  invalid =
      unpack_tile(second, two ? rows - kTileRows : first_rows, step_begin, step_end, out + kTileRows * 4, invalid);
  return any_invalid(invalid);
}

template <int Tokens>
void gemm_tokens(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t k_count, std::int32_t* sums) {
  __m512i acc[Tokens][2];
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) {
    acc[m][0] = _mm512_load_si512(sums + m * kRows);
    acc[m][1] = _mm512_load_si512(sums + m * kRows + kTileRows);
  }
  for (std::int64_t k = 0; k < k_count; k += 4, weights += kRows * 4, x += Tokens * 4) {
    const __m512i first = _mm512_load_si512(weights);
    const __m512i second = _mm512_load_si512(weights + kTileRows * 4);
#pragma GCC unroll 12
    for (int m = 0; m < Tokens; ++m) {
      const __m512i activations = broadcast_word(x + 4 * m);
      multiply_add(acc[m][0], first, activations);
      multiply_add(acc[m][1], second, activations);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) {
    _mm512_store_si512(sums + m * kRows, acc[m][0]);
    _mm512_store_si512(sums + m * kRows + kTileRows, acc[m][1]);
  }
}

using Gemm = void (*)(const std::uint8_t*, const std::uint8_t*, std::int64_t, std::int32_t*);
constexpr Gemm kGemms[kTokens] = {gemm_tokens<1>, gemm_tokens<2>,  gemm_tokens<3>,  gemm_tokens<4>,
                                  gemm_tokens<5>, gemm_tokens<6>,  gemm_tokens<7>,  gemm_tokens<8>,
                                  gemm_tokens<9>, gemm_tokens<10>, gemm_tokens<11>, gemm_tokens<12>};

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums) {
  kGemms[tokens - 1](static_cast<const std::uint8_t*>(panel), static_cast<const std::uint8_t*>(packed_tokens), k_count,
                     static_cast<std::int32_t*>(sums));
}

// The fields are masked in place, worth 1, 4, 16 and 64 times their value, and summed apart.
template <int Tokens>
__m512i direct_field_sums(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                          __m512i (&totals)[Tokens]) {
  const __mmask16 mask = row_mask(rows);
  const __m512i field[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                            _mm512_set1_epi8(static_cast<char>(0xc0))};
  __m512i invalid = _mm512_setzero_si512();
  for (std::int64_t begin = 0; begin < steps; begin += kFoldSteps) {
    const std::int64_t end = begin + kFoldSteps < steps ? begin + kFoldSteps : steps;
    __m512i acc[Tokens][4] = {};
    for (std::int64_t step = begin; step < end; ++step, x += kStepCodes * Tokens) {
      const __m512i words = load_step(tile + step * rows * 4, mask);
      invalid = collect_invalid(invalid, words);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        const __m512i codes = _mm512_and_si512(words, field[f]);
#pragma GCC unroll 4
        for (int m = 0; m < Tokens; ++m) {
          multiply_add(acc[m][f], codes, broadcast_word(x + 4 * (f * Tokens + m)));
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < Tokens; ++m) {
      const __m512i low = _mm512_add_epi32(acc[m][0], _mm512_srai_epi32(acc[m][1], 2));
      const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(acc[m][2], 4), _mm512_srai_epi32(acc[m][3], 6));
      totals[m] = _mm512_add_epi32(totals[m], _mm512_add_epi32(low, high));
    }
  }
  return invalid;
}

// The fields are shifted down and share one register of sums for each token.
template <int Tokens>
__m512i direct_shared_sums(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                           __m512i (&totals)[Tokens]) {
  const __mmask16 mask = row_mask(rows);
  const __m512i low = low_fields();
  __m512i invalid = _mm512_setzero_si512();
  for (std::int64_t step = 0; step < steps; ++step, x += kStepCodes * Tokens) {
    const __m512i words = load_step(tile + step * rows * 4, mask);
    invalid = collect_invalid(invalid, words);
    const __m512i codes[4] = {_mm512_and_si512(words, low), _mm512_and_si512(_mm512_srli_epi32(words, 2), low),
                              _mm512_and_si512(_mm512_srli_epi32(words, 4), low),
                              _mm512_and_si512(_mm512_srli_epi32(words, 6), low)};
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
#pragma GCC unroll 12
      for (int m = 0; m < Tokens; ++m) {
        multiply_add(totals[m], codes[f], broadcast_word(x + 4 * (f * Tokens + m)));
      }
    }
  }
  return invalid;
}

template <int Tokens>
std::uint32_t direct_tokens(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                            std::int32_t* sums) {
  __m512i totals[Tokens];
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) totals[m] = _mm512_load_si512(sums + m * kTileRows);
  __m512i invalid;
  if constexpr (Tokens <= kFieldSumTokens) {
    invalid = direct_field_sums<Tokens>(tile, rows, steps, x, totals);
  } else {
    invalid = direct_shared_sums<Tokens>(tile, rows, steps, x, totals);
  }
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) _mm512_store_si512(sums + m * kTileRows, totals[m]);
  return any_invalid(invalid);
}

using Direct = std::uint32_t (*)(const std::uint8_t*, std::int64_t, std::int64_t, const std::uint8_t*, std::int32_t*);
constexpr Direct kDirects[kDirectTokens] = {direct_tokens<1>, direct_tokens<2>,  direct_tokens<3>,  direct_tokens<4>,
                                            direct_tokens<5>, direct_tokens<6>,  direct_tokens<7>,  direct_tokens<8>,
                                            direct_tokens<9>, direct_tokens<10>, direct_tokens<11>, direct_tokens<12>};

std::uint32_t direct(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps, const void* packed_tokens,
                     std::int64_t tokens, void* sums) {
  return kDirects[tokens - 1](tile, tile_rows, steps, static_cast<const std::uint8_t*>(packed_tokens),
                              static_cast<std::int32_t*>(sums));
}

}  // namespace

constinit const TileFunctions kInt8Avx512VnniTiles = {
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
