// int8 activations with ARM64's dot product: sdot multiplies 16 codes by 16 activations and adds groups of four.
//
// CPU features: NEON and dot product (ARMv8.2). Packer, layout of the panel: int8_neon-inl.h. Tokens: [k / 16][token]
// vectors of 16 activations, whose 32-bit elements sdot takes one at a time. Sums are exact in int32 (wrapping ones
// cancel).
#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/int8_neon-inl.h"
#include "bitcore/kernels/store-inl.h"

namespace bitcore {
namespace {

// 5 tokens x 4 registers of sums, 4 of weights and 5 of activations: 29 of 32 registers.
constexpr int kTokens = 5;
constexpr int kDirectTokens = 4;

void pack_tokens(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count, void* packed) {
  auto* out = static_cast<std::uint8_t*>(packed);
  for (std::int64_t k = 0; k < k_count; k += kStepCodes) {
    for (std::int64_t m = 0; m < tokens; ++m, out += kStepCodes) {
      std::memcpy(out, static_cast<const std::uint8_t*>(x) + m * row_stride + k, kStepCodes);
    }
  }
}

// Group `Group` of a step: four k of 16 rows, times all tokens.
template <int Group, int Tokens>
void multiply_group(int32x4_t (&acc)[Tokens][kQuarters], const int8x16_t (&codes)[kQuarters],
                    const int8x16_t (&x)[Tokens]) {
#pragma GCC unroll 5
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) acc[m][v] = vdotq_laneq_s32(acc[m][v], codes[v], x[m], Group);
  }
}

template <int Tokens>
void load_tokens(const std::int8_t* x, int8x16_t (&out)[Tokens]) {
#pragma GCC unroll 5
  for (int m = 0; m < Tokens; ++m) out[m] = vld1q_s8(x + m * kStepCodes);
}

template <int Tokens>
void load_sums(const std::int32_t* sums, int32x4_t (&acc)[Tokens][kQuarters]) {
#pragma GCC unroll 5
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) acc[m][v] = vld1q_s32(sums + m * kRows + v * kLanes);
  }
}

template <int Tokens>
void keep_sums(const int32x4_t (&acc)[Tokens][kQuarters], std::int32_t* sums) {
#pragma GCC unroll 5
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) vst1q_s32(sums + m * kRows + v * kLanes, acc[m][v]);
  }
}

template <int Group, int Tokens>
void multiply_panel_group(int32x4_t (&acc)[Tokens][kQuarters], const std::int8_t* weights,
                          const int8x16_t (&x)[Tokens]) {
  int8x16_t codes[kQuarters];
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) codes[v] = vld1q_s8(weights + (Group * kRows + v * kLanes) * 4);
  multiply_group<Group>(acc, codes, x);
}

// Calls itself down to `tokens`.
template <int Tokens>
void gemm_tokens(const std::int8_t* weights, const std::int8_t* x, std::int64_t tokens, std::int64_t k_count,
                 std::int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return gemm_tokens<Tokens - 1>(weights, x, tokens, k_count, sums);
  }
  int32x4_t acc[Tokens][kQuarters];
  load_sums(sums, acc);
  for (std::int64_t k = 0; k < k_count; k += kStepCodes, weights += kStepCodes * kRows, x += kStepCodes * Tokens) {
    int8x16_t activations[Tokens];
    load_tokens(x, activations);
    multiply_panel_group<0>(acc, weights, activations);
    multiply_panel_group<1>(acc, weights, activations);
    multiply_panel_group<2>(acc, weights, activations);
    multiply_panel_group<3>(acc, weights, activations);
  }
  keep_sums(acc, sums);
}

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, const Groups* groups,
          void* sums) {
  const auto* weights = static_cast<const std::int8_t*>(panel);
  const auto* x = static_cast<const std::int8_t*>(packed_tokens);
  multiply_by_groups<kRows, kTokens, std::int32_t>(
      groups, tokens, k_count, sums, [&](std::int64_t k, std::int64_t count, std::int32_t* group) {
        gemm_tokens<kTokens>(weights + k * kRows, x + k * tokens, tokens, count, group);
      });
}

template <int Field, int Tokens>
void multiply_field(int32x4_t (&acc)[Tokens][kQuarters], const uint32x4_t (&words)[kQuarters],
                    const int8x16_t (&x)[Tokens]) {
  int8x16_t codes[kQuarters];
#pragma GCC unroll 4
  for (int v = 0; v < kQuarters; ++v) codes[v] = field_codes<Field>(words[v]);
  multiply_group<Field>(acc, codes, x);
}

// Calls itself down to `tokens`.
template <int Tokens>
void direct_tokens(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::int8_t* x,
                   std::int64_t tokens, std::int32_t* sums, uint32x4_t (&invalid)[kQuarters]) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return direct_tokens<Tokens - 1>(tile, rows, steps, x, tokens, sums, invalid);
  }
  int32x4_t acc[Tokens][kQuarters] = {};
  for (std::int64_t step = 0; step < steps; ++step, tile += rows * 4, x += kStepCodes * Tokens) {
    uint32x4_t words[kQuarters];
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) {
      words[v] = load_quarter(tile, v);
      invalid[v] = collect_invalid(invalid[v], words[v]);
    }
    int8x16_t activations[Tokens];
    load_tokens(x, activations);
    multiply_field<0>(acc, words, activations);
    multiply_field<1>(acc, words, activations);
    multiply_field<2>(acc, words, activations);
    multiply_field<3>(acc, words, activations);
  }
  keep_sums(acc, sums);
}

std::uint32_t direct(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps, const void* packed_tokens,
                     std::int64_t tokens, const Groups* groups, void* sums) {
  const auto* x = static_cast<const std::int8_t*>(packed_tokens);
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

constinit const TileFunctions kInt8NeonDotTiles = {
    .activation_dtype = ActivationDtype::int8,
    .token_element = 1,
    .offset_codes = true,
    .pack_tokens = pack_tokens,
    .store = store_sums<std::int32_t>,
    .direct_tokens = kDirectTokens,
    .panels = {.rows = kRows, .token_tile = kTokens, .k_block = kBlock, .element = 1, .gemm = gemm},
    .two_bit = {.unpack_panel = unpack_panel, .direct = direct},
};

}  // namespace bitcore
