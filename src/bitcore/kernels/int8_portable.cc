// int8 activations on any CPU: dot products of int16, the form that compilers turn into pmaddwd or smlal.
//
// Packer: standard 2-bit form. CPU feature: none. Panel: 16 rows x k_block int16 weights, row-major; tokens: int16,
// row-major. Within 16 k both are in the order of the packed bits (byte j, field f) instead of k = 4f + j: an int32
// sum does not depend on it, and a packed byte then becomes four adjacent weights by one table look-up.
#include <array>

#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/store-inl.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
constexpr int kTokens = 4;
// 16 rows x 512 x 2 bytes = 16 KiB: half of a common L1 cache.
constexpr std::int64_t kBlock = 512;

// The four weights of a packed byte.
struct Quad {
  std::int16_t weights[4];
};

constexpr std::array<Quad, 256> make_quads() {
  std::array<Quad, 256> quads{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int field = 0; field < 4; ++field) {
      quads[static_cast<std::size_t>(byte)].weights[field] = static_cast<std::int16_t>(((byte >> (2 * field)) & 3) - 1);
    }
  }
  return quads;
}

constexpr std::array<Quad, 256> kQuads = make_quads();

void pack_tokens(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count, void* packed) {
  auto* out = static_cast<std::int16_t*>(packed);
  for (std::int64_t m = 0; m < tokens; ++m) {
    const auto* row = static_cast<const std::int8_t*>(x) + m * row_stride;
    for (std::int64_t k = 0; k < k_count; k += kStepCodes, out += kStepCodes) {
      for (int byte = 0; byte < 4; ++byte) {
        for (int field = 0; field < 4; ++field) out[4 * byte + field] = row[k + 4 * field + byte];
      }
    }
  }
}

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  auto* out = static_cast<std::int16_t*>(panel);
  const std::int64_t k_count = (step_end - step_begin) * kStepCodes;
  std::uint32_t invalid = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    auto* quads = reinterpret_cast<Quad*>(out + row * k_count);
    for (std::int64_t step = step_begin; step < step_end; ++step, quads += 4) {
      const std::uint8_t* bytes = tiles + (step * rows + row) * 4;
      invalid |= invalid_codes(load_word(bytes));
      for (int byte = 0; byte < 4; ++byte) quads[byte] = kQuads[bytes[byte]];
    }
  }
  std::fill_n(out + rows * k_count, (kRows - rows) * k_count, std::int16_t{0});
  return invalid;
}

// Four rows at once share the loads of x.
void dot_four_rows(const std::int16_t* weights, const std::int16_t* x, std::int64_t stride, std::int64_t k_count,
                   std::int32_t* sums) {
  const std::int16_t* row0 = weights;
  const std::int16_t* row1 = weights + stride;
  const std::int16_t* row2 = weights + 2 * stride;
  const std::int16_t* row3 = weights + 3 * stride;
  std::int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
  for (std::int64_t k = 0; k < k_count; ++k) {
    sum0 += row0[k] * x[k];
    sum1 += row1[k] * x[k];
    sum2 += row2[k] * x[k];
    sum3 += row3[k] * x[k];
  }
  sums[0] += sum0;
  sums[1] += sum1;
  sums[2] += sum2;
  sums[3] += sum3;
}

// Of a panel and tokens of `stride` k.
void gemm_part(const std::int16_t* weights, const std::int16_t* x, std::int64_t tokens, std::int64_t stride,
               std::int64_t k_count, std::int32_t* sums) {
  for (std::int64_t row = 0; row < kRows; row += 4) {
    for (std::int64_t m = 0; m < tokens; ++m) {
      dot_four_rows(weights + row * stride, x + m * stride, stride, k_count, sums + m * kRows + row);
    }
  }
}

void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, const Groups* groups,
          void* sums) {
  const auto* weights = static_cast<const std::int16_t*>(panel);
  const auto* x = static_cast<const std::int16_t*>(packed_tokens);
  multiply_by_groups<kRows, kTokens, std::int32_t>(groups, tokens, k_count, sums,
                                                   [&](std::int64_t k, std::int64_t count, std::int32_t* group) {
                                                     gemm_part(weights + k, x + k, tokens, k_count, count, group);
                                                   });
}

}  // namespace

constinit const TileFunctions kInt8PortableTiles = {
    .activation_dtype = ActivationDtype::int8,
    .token_element = sizeof(std::int16_t),
    .offset_codes = false,
    .pack_tokens = pack_tokens,
    .store = store_sums<std::int32_t>,
    .panels = {.rows = kRows, .token_tile = kTokens, .k_block = kBlock, .element = sizeof(std::int16_t), .gemm = gemm},
    .two_bit = {.unpack_panel = unpack_panel},
};

}  // namespace bitcore
