// float32 activations on any CPU: lanes are output rows, so that no sum crosses lanes.
//
// Packer: standard 2-bit form. CPU feature: none (GCC's and Clang's vector types become SSE or NEON registers).
// Panel: [k][16 rows] float weights; tokens: [k][token]. A sum runs over k in order within blocks of kBlock, then over
// the blocks in order: the same for every number of rows and threads. With weights -1, 0, 1 every product is exact.
#include "kernels/builtin.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
// 2 tokens x 4 registers of sums, 4 of weights and 2 of activations fit the 16 vector registers of SSE.
constexpr std::int64_t kTokens = 2;
// 16 rows x 256 x 4 bytes = 16 KiB: half of a common L1 cache.
constexpr std::int64_t kBlock = 256;

typedef float Vector __attribute__((vector_size(16), may_alias));
typedef std::int32_t IntVector __attribute__((vector_size(16), may_alias));
constexpr int kLanes = 4;
constexpr int kVectors = kRows / kLanes;

void pack_tokens(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count, void* packed) {
  auto* out = static_cast<float*>(packed);
  for (std::int64_t m = 0; m < tokens; ++m) {
    const auto* row = reinterpret_cast<const float*>(static_cast<const std::byte*>(x) + m * row_stride);
    for (std::int64_t k = 0; k < k_count; ++k) out[k * tokens + m] = row[k];
  }
}

// The words of one step, weight 0 in absent rows. Returns nonzero where a code is invalid.
std::uint32_t load_step(const std::uint8_t* bytes, std::int64_t rows, std::uint32_t* words) {
  std::uint32_t invalid = 0;
  for (std::int64_t row = 0; row < kRows; ++row) words[row] = 0x55555555u;
  std::memcpy(words, bytes, static_cast<std::size_t>(rows) * 4);
  for (std::int64_t row = 0; row < kRows; ++row) invalid |= invalid_codes(words[row]);
  return invalid;
}

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  auto* out = static_cast<Vector*>(panel);
  std::uint32_t invalid = 0;
  for (std::int64_t step = step_begin; step < step_end; ++step, out += kStepCodes * kVectors) {
    alignas(64) std::uint32_t words[kRows];
    invalid |= load_step(tiles + step * rows * 4, rows, words);
    for (int v = 0; v < kVectors; ++v) {
      const IntVector packed = reinterpret_cast<const IntVector*>(words)[v];
#pragma GCC unroll 16
      for (int k = 0; k < kStepCodes; ++k) {
        const IntVector weights = ((packed >> (8 * (k % 4) + 2 * (k / 4))) & 3) - 1;
        out[k * kVectors + v] = __builtin_convertvector(weights, Vector);
      }
    }
  }
  return invalid;
}

template <int Tokens>
void gemm_tokens(const Vector* weights, const float* x, std::int64_t k_count, Vector* sums) {
  Vector block[Tokens][kVectors] = {};
  for (std::int64_t k = 0; k < k_count; ++k, weights += kVectors, x += Tokens) {
#pragma GCC unroll 4
    for (int m = 0; m < Tokens; ++m) {
      const Vector broadcast = {x[m], x[m], x[m], x[m]};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) block[m][v] += weights[v] * broadcast;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m * kVectors + v] += block[m][v];
  }
}

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums) {
  const auto* weights = static_cast<const Vector*>(panel);
  const auto* x = static_cast<const float*>(packed_tokens);
  if (tokens == kTokens) {
    gemm_tokens<kTokens>(weights, x, k_count, static_cast<Vector*>(sums));
  } else {
    gemm_tokens<1>(weights, x, k_count, static_cast<Vector*>(sums));
  }
}

void store(const void* sums, std::int64_t count, float x_scale, const float* w_scale, const float* bias, void* y,
           DType dtype) {
  store_row(static_cast<const float*>(sums), count, x_scale, w_scale, bias, y, dtype);
}

}  // namespace

constinit const TileFunctions kFloat32PortableTiles = {
    .activation_dtype = ActivationDtype::float32,
    .panel_rows = kRows,
    .token_tile = kTokens,
    .k_block = kBlock,
    .direct_tokens = 0,
    .panel_element = sizeof(float),
    .token_element = sizeof(float),
    .offset_codes = false,
    .absmax = absmax_bits,
    .quantize = nullptr,
    .pack_tokens = pack_tokens,
    .unpack_panel = unpack_panel,
    .gemm = gemm,
    .direct = nullptr,
    .store = store,
};

}  // namespace bitcore
