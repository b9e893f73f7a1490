// Tile functions of the float32 kernels, for any vector width: lanes are output rows, so that no sum crosses lanes.
//
// Packer: standard 2-bit form. Panel: [k][rows] float weights; tokens: [k][token]. A sum runs over k in order within
// blocks of k_block, then over the blocks in order: the same for every number of rows and threads. With weights -1, 0
// and 1 every product is exact, so that a fused multiply-add gives the bits of a product and a sum.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include "kernels/base3_recode-inl.h"
#include "kernels/tile_functions.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

/// @tparam Isa Has Vector (kLanes floats), load, store, broadcast, add, multiply_add(acc, a, b), and
///   decode<Shift>(words): the weights, as floats, of the 2-bit fields at bit Shift of kLanes adjacent 32-bit words.
/// @tparam Vectors Registers of output rows. @tparam Tokens Rows of x that share a load of weights.
/// @tparam Block k of a panel.
template <class Isa, int Vectors, int Tokens, int Block>
struct Float32Tiles {
  using Vector = typename Isa::Vector;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kRows = Vectors * kLanes;
  static constexpr int kTileVectors = kTileRows / kLanes;
  static_assert(kRows % kTileRows == 0);

  static void pack_tokens(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count,
                          void* packed) {
    auto* out = static_cast<float*>(packed);
    for (std::int64_t m = 0; m < tokens; ++m) {
      const auto* row = reinterpret_cast<const float*>(static_cast<const std::byte*>(x) + m * row_stride);
      for (std::int64_t k = 0; k < k_count; ++k) out[k * tokens + m] = row[k];
    }
  }

  // The words of one step of a tile, weight 0 in absent rows. Returns nonzero where a code is invalid.
  static std::uint32_t load_step(const std::uint8_t* bytes, std::int64_t rows, std::uint32_t* words) {
    std::uint32_t invalid = 0;
    for (std::int64_t row = 0; row < kTileRows; ++row) words[row] = 0x55555555u;
    std::memcpy(words, bytes, static_cast<std::size_t>(rows) * 4);
    for (std::int64_t row = 0; row < kTileRows; ++row) invalid |= invalid_codes(words[row]);
    return invalid;
  }

  // Field `Field` of byte `Byte` is k = 4 * Field + Byte.
  template <int K>
  static void unpack_k(const std::uint32_t* words, float* panel) {
    for (int v = 0; v < kTileVectors; ++v) {
      Isa::store(panel + K * kRows + v * kLanes, Isa::template decode<8 * (K % 4) + 2 * (K / 4)>(words + v * kLanes));
    }
  }

  template <int... K>
  static void unpack_step(const std::uint32_t* words, float* panel, std::integer_sequence<int, K...>) {
    (unpack_k<K>(words, panel), ...);
  }

  static std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                                    std::int64_t step_begin, std::int64_t step_end, void* panel) {
    std::uint32_t invalid = 0;
    for (std::int64_t row = 0; row < kRows; row += kTileRows) {
      const std::int64_t present = rows - row < kTileRows ? rows - row : kTileRows;
      const std::int64_t tile_rows = present > 0 ? present : 0;
      auto* out = static_cast<float*>(panel) + row;
      for (std::int64_t step = step_begin; step < step_end; ++step, out += kStepCodes * kRows) {
        alignas(64) std::uint32_t words[kTileRows];
        invalid |= load_step(tiles + row * payload_row_bytes + step * tile_rows * 4, tile_rows, words);
        unpack_step(words, out, std::make_integer_sequence<int, kStepCodes>());
      }
    }
    return invalid;
  }

  template <int Count>
  static void gemm_tokens(const float* weights, const float* x, std::int64_t k_count, float* sums) {
    Vector block[Count][Vectors];
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) block[m][v] = Isa::broadcast(0.0f);
    }
    for (std::int64_t k = 0; k < k_count; ++k, weights += kRows, x += Count) {
      Vector w[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) w[v] = Isa::load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < Count; ++m) {
        const Vector activation = Isa::broadcast(x[m]);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) Isa::multiply_add(block[m][v], w[v], activation);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        float* sum = sums + m * kRows + v * kLanes;
        Isa::store(sum, Isa::add(Isa::load(sum), block[m][v]));
      }
    }
  }

  // Calls gemm_tokens<tokens>.
  template <int Count = Tokens>
  static void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count,
                   void* sums) {
    if constexpr (Count > 1) {
      if (tokens < Count) return gemm<Count - 1>(panel, packed_tokens, tokens, k_count, sums);
    }
    gemm_tokens<Count>(static_cast<const float*>(panel), static_cast<const float*>(packed_tokens), k_count,
                       static_cast<float*>(sums));
  }

  static constexpr TileFunctions table() {
    return {
        .activation_dtype = ActivationDtype::float32,
        .panel_rows = kRows,
        .token_tile = Tokens,
        .k_block = Block,
        .direct_tokens = 0,
        .panel_element = sizeof(float),
        .token_element = sizeof(float),
        .offset_codes = false,
        .absmax = absmax_bits,
        .quantize = nullptr,
        .pack_tokens = pack_tokens,
        .unpack_panel = unpack_panel,
        .gemm = gemm<Tokens>,
        .direct = nullptr,
        .store = store_sums<float>,
        .base3_recode = recode_base3,
    };
  }
};

}  // namespace
}  // namespace bitcore
