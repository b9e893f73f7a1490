// int8 activations with plain NEON: smlal multiplies 8 codes by 8 activations and adds the products to int16.
//
// CPU feature: NEON (every ARM64 CPU). Packer, layout of the panel: int8_neon-inl.h. Tokens: [k / 4][token] words of
// four activations.
//
// Bound: a lane of int16 gets one product of each group of four k: at most 2 * 128 = 256 in magnitude, on the negative
// side only, 254 on the positive one. 128 groups reach -32,768 and 32,512 and fit. After kFoldGroups groups the lanes
// are added to int32.
#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/int8_neon-inl.h"
#include "bitcore/kernels/int8_words-inl.h"
#include "bitcore/kernels/store-inl.h"

namespace bitcore {
namespace {

// 3 tokens x 8 registers of sums, 3 of activations, 4 of weights: 31 of 32 registers.
constexpr int kTokens = 3;
// 2 tokens x 8 registers of sums, 4 of packed words, 4 of invalid codes: 24, and what unpacking needs.
constexpr int kDirectTokens = 2;
constexpr std::int64_t kFoldGroups = 128;
constexpr std::int64_t kFoldSteps = kFoldGroups / 4;

// One tile's int16 sums of a token: a lane is one of the four k of a group, for one of 16 rows.
struct Products {
  int16x8_t low[kQuarters];   // rows 0 and 1 of each quarter
  int16x8_t high[kQuarters];  // rows 2 and 3
};

void clear(Products& products) {
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) products.low[v] = products.high[v] = vdupq_n_s16(0);
}

// products += codes * activations of a group of four k. The empty statements tie the sums to one register each.
void multiply_add(Products& products, const int8x16_t (&codes)[kQuarters], int8x16_t activations) {
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) {
    products.low[v] = vmlal_s8(products.low[v], vget_low_s8(codes[v]), vget_low_s8(activations));
    products.high[v] = vmlal_high_s8(products.high[v], codes[v], activations);
    asm("" : "+w"(products.low[v]), "+w"(products.high[v]));
  }
}

// sums += the four lanes of each row.
void fold(const Products& products, std::int32_t* sums) {
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) {
    const int32x4_t rows = vpaddq_s32(vpaddlq_s16(products.low[v]), vpaddlq_s16(products.high[v]));
    vst1q_s32(sums + v * kLanes, vaddq_s32(vld1q_s32(sums + v * kLanes), rows));
  }
}

int8x16_t broadcast_word(const std::uint8_t* activations) {
  return vreinterpretq_s8_u32(vdupq_n_u32(load_word(activations)));
}

// At most kFoldGroups groups of four k.
template <int Tokens>
void gemm_groups(const std::int8_t* weights, const std::uint8_t* x, std::int64_t groups, std::int32_t* sums) {
  Products products[Tokens];
#pragma GCC unroll 3
  for (int m = 0; m < Tokens; ++m) clear(products[m]);
  for (std::int64_t group = 0; group < groups; ++group, weights += kRows * 4, x += Tokens * 4) {
    int8x16_t codes[kQuarters];
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) codes[v] = vld1q_s8(weights + v * kLanes * 4);
#pragma GCC unroll 3
    for (int m = 0; m < Tokens; ++m) multiply_add(products[m], codes, broadcast_word(x + 4 * m));
  }
#pragma GCC unroll 3
  for (int m = 0; m < Tokens; ++m) fold(products[m], sums + m * kRows);
}

// Calls itself down to `tokens`.
template <int Tokens>
void gemm_tokens(const std::int8_t* weights, const std::uint8_t* x, std::int64_t tokens, std::int64_t k_count,
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

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, const Groups* groups,
          void* sums) {
  const auto* weights = static_cast<const std::int8_t*>(panel);
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  multiply_by_groups<kRows, kTokens, std::int32_t>(
      groups, tokens, k_count, sums, [&](std::int64_t k, std::int64_t count, std::int32_t* group) {
        gemm_tokens<kTokens>(weights + k * kRows, x + k * tokens, tokens, count, group);
      });
}

template <int Field, int Tokens>
void multiply_field(Products (&products)[Tokens], const uint32x4_t (&words)[kQuarters], const std::uint8_t* x) {
  int8x16_t codes[kQuarters];
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) codes[v] = field_codes<Field>(words[v]);
#pragma GCC unroll 2
  for (int m = 0; m < Tokens; ++m) multiply_add(products[m], codes, broadcast_word(x + 4 * (Field * Tokens + m)));
}

// At most kFoldSteps steps.
template <int Tokens>
void direct_steps(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                  std::int32_t* sums, uint32x4_t (&invalid)[kQuarters]) {
  Products products[Tokens];
#pragma GCC unroll 2
  for (int m = 0; m < Tokens; ++m) clear(products[m]);
  for (std::int64_t step = 0; step < steps; ++step, tile += rows * 4, x += kStepCodes * Tokens) {
    uint32x4_t words[kQuarters];
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) {
      words[v] = load_quarter(tile, v);
      invalid[v] = collect_invalid(invalid[v], words[v]);
    }
    multiply_field<0>(products, words, x);
    multiply_field<1>(products, words, x);
    multiply_field<2>(products, words, x);
    multiply_field<3>(products, words, x);
  }
#pragma GCC unroll 2
  for (int m = 0; m < Tokens; ++m) fold(products[m], sums + m * kTileRows);
}

// Calls itself down to `tokens`.
template <int Tokens>
void direct_tokens(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                   std::int64_t tokens, std::int32_t* sums, uint32x4_t (&invalid)[kQuarters]) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return direct_tokens<Tokens - 1>(tile, rows, steps, x, tokens, sums, invalid);
  }
  for (std::int64_t step = 0; step < steps; step += kFoldSteps) {
    const std::int64_t count = steps - step < kFoldSteps ? steps - step : kFoldSteps;
    direct_steps<Tokens>(tile + step * rows * 4, rows, count, x + step * kStepCodes * Tokens, sums, invalid);
  }
}

std::uint32_t direct(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps, const void* packed_tokens,
                     std::int64_t tokens, const Groups* groups, void* sums) {
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  uint32x4_t invalid[kQuarters] = {};
  std::memset(sums, 0, static_cast<std::size_t>(tokens * kTileRows) * sizeof(std::int32_t));
  multiply_by_groups<kRows, kDirectTokens, std::int32_t>(
      groups, tokens, steps * kStepCodes, sums, [&](std::int64_t k, std::int64_t count, std::int32_t* out) {
        direct_tokens<kDirectTokens>(tile + k / kStepCodes * tile_rows * 4, tile_rows, count / kStepCodes,
                                     x + k * tokens, tokens, out, invalid);
      });
  return any_invalid(invalid, tile_rows);
}

}  // namespace

constinit const TileFunctions kInt8NeonTiles = {
    .activation_dtype = ActivationDtype::int8,
    .token_element = 1,
    .offset_codes = true,
    .pack_tokens = pack_token_words,
    .store = store_sums<std::int32_t>,
    .direct_tokens = kDirectTokens,
    .panels = {.rows = kRows, .token_tile = kTokens, .k_block = kBlock, .element = 1, .gemm = gemm},
    .two_bit = {.unpack_panel = unpack_panel, .direct = direct},
};

}  // namespace bitcore
