// Tile functions of the float32 kernels, for any vector width: lanes are output rows, so that no sum crosses lanes.
//
// Packer: standard 2-bit form. Tokens: [k][token]. Float32Direct multiplies packed weights as they are: weights become
// floats in registers. Float32Panels adds panels of unpacked weights, [k][rows], for kernels whose registers hold too
// few sums to make that worth its while for many tokens.
//
// A sum is taken in chains, one for each step of 16 k, as docs/contract.md says: in a chain k in order, then the chains
// in order. That is the same for any number of rows and threads, with and without panels, in both layouts and with
// every instruction set. With weights -1, 0 and 1 every product is exact, so that a fused multiply-add gives the bits
// of a product and a sum. Short chains overlap in the processor, where one long chain would wait for the latency of
// each addition.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <algorithm>
#include <bit>
#include <utility>

#include "bitcore/kernels/base3_recode-inl.h"
#include "bitcore/kernels/store-inl.h"
#include "bitcore/kernels/tile_functions.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"

namespace bitcore {
namespace {

// So many chains of a step keep fewer multiply-adds under way than two pipes with a latency of 4 cycles take: then two
// steps go together.
constexpr int kFewChains = 4;
// How far ahead of the weights being multiplied the next ones are fetched: beyond the page, where the hardware's own
// prefetching stops.
constexpr std::int64_t kPrefetchBytes = 4096;

/// What both ways share.
/// @tparam Isa Has
///   Vector: kLanes floats; load, store, broadcast, add, multiply_add(acc, a, b);
///   Words: kLanes 32-bit words; load_words (of any alignment), store_words, or_adjacent(a, b) = a | (b & b >> 1);
///   weights<Shift>(words): the weights, as floats, of the 2-bit fields at bit Shift of each word.
template <class Isa>
struct Float32Steps {
  using Vector = typename Isa::Vector;
  using Words = typename Isa::Words;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kTileVectors = kTileRows / kLanes;
  static constexpr auto kEachCode = std::make_integer_sequence<int, kStepCodes>();

  static void pack_tokens(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count,
                          void* packed) {
    auto* out = static_cast<float*>(packed);
    for (std::int64_t m = 0; m < tokens; ++m) {
      const auto* row = reinterpret_cast<const float*>(static_cast<const std::byte*>(x) + m * row_stride);
      for (std::int64_t k = 0; k < k_count; ++k) out[k * tokens + m] = row[k];
    }
  }

  // The weights of k = K of a step: byte K % 4, field K / 4.
  template <int K>
  static Vector weights(Words words) {
    return Isa::template weights<8 * (K % 4) + 2 * (K / 4)>(words);
  }

  // Nonzero where one of the first `rows` lanes holds a code 3. `collected`: by or_adjacent(), whose bits between the
  // fields are noise. Where a tile has fewer rows than lanes the others have read what follows, in the end the trailer,
  // which is long enough.
  static std::uint32_t any_invalid(Words collected, std::int64_t rows) {
    std::uint32_t words[kLanes];
    Isa::store_words(words, collected);
    std::uint32_t any = 0;
    for (std::int64_t row = 0; row < kLanes && row < rows; ++row) any |= words[row];
    return any & 0x55555555u;
  }

  static void add_to(float* sums, Vector chain) { Isa::store(sums, Isa::add(Isa::load(sums), chain)); }
};

/// @tparam Tokens Most rows of x that share the unpacking of a weight. @tparam Sums Registers for sums: where a tile
///   has more registers of rows than that leaves to each token, they are multiplied one after another.
template <class Isa, int Tokens, int Sums>
struct Float32Direct : Float32Steps<Isa> {
  using Steps = Float32Steps<Isa>;
  using Steps::kLanes;
  using typename Steps::Vector;
  using typename Steps::Words;

  // chain[c][m] += the weights of k = K of a step in words[c] times the activation of token m in the step's x[c].
  template <int K, int Count, int Chains>
  [[gnu::always_inline]] static void multiply_k(Vector (&chain)[Chains][Count], const Words (&words)[Chains],
                                                const float* const (&x)[Chains]) {
    Vector w[Chains];
#pragma GCC unroll 16
    for (int c = 0; c < Chains; ++c) w[c] = Steps::template weights<K>(words[c]);
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) {
#pragma GCC unroll 16
      for (int c = 0; c < Chains; ++c) Isa::multiply_add(chain[c][m], w[c], Isa::broadcast(x[c][K * Count + m]));
    }
    asm volatile("" ::: "memory");  // keeps GCC 12 from unpacking the next weights early and spilling registers
  }

  template <int Count, int Chains, int... K>
  [[gnu::always_inline]] static void multiply_codes(Vector (&chain)[Chains][Count], const Words (&words)[Chains],
                                                    const float* const (&x)[Chains], std::integer_sequence<int, K...>) {
    (multiply_k<K>(chain, words, x), ...);
  }

  // `Together` steps of `Registers` registers of rows times `Count` tokens.
  // @param bytes Of the first row. @param step_bytes From one step to the next. @param sums [Count][kTileRows]
  template <int Count, int Together, int Registers>
  static void multiply_steps(const std::uint8_t* bytes, std::int64_t step_bytes, const float* x,
                             Words (&invalid)[Registers], float* sums) {
    constexpr int kChains = Together * Registers;
    Vector chain[kChains][Count];
    Words words[kChains];
    const float* chain_x[kChains];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      const std::uint8_t* step = bytes + c / Registers * step_bytes;
      if (c % Registers == 0) __builtin_prefetch(step + kPrefetchBytes);
      words[c] = Isa::load_words(step + c % Registers * kLanes * 4);
      invalid[c % Registers] = Isa::or_adjacent(invalid[c % Registers], words[c]);
      chain_x[c] = x + c / Registers * kStepCodes * Count;
#pragma GCC unroll 16
      for (int m = 0; m < Count; ++m) chain[c][m] = Isa::broadcast(0.0f);
    }
    multiply_codes(chain, words, chain_x, Steps::kEachCode);
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 16
      for (int m = 0; m < Count; ++m) Steps::add_to(sums + m * kTileRows + c % Registers * kLanes, chain[c][m]);
    }
  }

  // All steps of the registers of rows that begin `lane` rows into a tile.
  template <int Count, int Registers>
  static std::uint32_t multiply_lanes(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t lane,
                                      std::int64_t steps, const float* x, float* sums) {
    constexpr int kTogether = Registers * Count <= kFewChains ? 2 : 1;
    constexpr std::int64_t kStepX = kStepCodes * Count;
    const std::int64_t step_bytes = tile_rows * 4;
    const std::uint8_t* bytes = tile + lane * 4;
    Words invalid[Registers] = {};
    std::int64_t step = 0;
    for (; step + kTogether <= steps; step += kTogether) {
      multiply_steps<Count, kTogether>(bytes + step * step_bytes, step_bytes, x + step * kStepX, invalid, sums);
    }
    if (step < steps) {
      multiply_steps<Count, 1>(bytes + step * step_bytes, step_bytes, x + step * kStepX, invalid, sums);
    }
    std::uint32_t any = 0;
    for (int v = 0; v < Registers; ++v) any |= Steps::any_invalid(invalid[v], tile_rows - lane - v * kLanes);
    return any;
  }

  // All rows of some steps.
  template <int Count>
  static std::uint32_t multiply_rows(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps,
                                     const float* x, float* sums) {
    constexpr int kFitting = std::min<int>(Sums / Count, Steps::kTileVectors);
    constexpr int kRegisters = std::bit_floor(static_cast<unsigned>(kFitting));
    std::uint32_t invalid = 0;
    for (std::int64_t lane = 0; lane < tile_rows; lane += kRegisters * kLanes) {
      invalid |= multiply_lanes<Count, kRegisters>(tile, tile_rows, lane, steps, x, sums + lane);
    }
    return invalid;
  }

  // Calls multiply_rows<tokens>.
  template <int Count = Tokens>
  static std::uint32_t direct(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps,
                              const void* packed_tokens, std::int64_t tokens, const Groups* groups, void* sums) {
    if constexpr (Count > 1) {
      if (tokens < Count) return direct<Count - 1>(tile, tile_rows, steps, packed_tokens, tokens, groups, sums);
    }
    const auto* x = static_cast<const float*>(packed_tokens);
    std::fill_n(static_cast<float*>(sums), Count * kTileRows, 0.0f);
    std::uint32_t invalid = 0;
    multiply_by_groups<kTileRows, Count, float>(
        groups, Count, steps * kStepCodes, sums, [&](std::int64_t k, std::int64_t count, float* out) {
          invalid |= multiply_rows<Count>(tile + k / kStepCodes * tile_rows * 4, tile_rows, count / kStepCodes,
                                          x + k * Count, out);
        });
    return invalid;
  }

  static constexpr TileFunctions table() {
    return {
        .activation_dtype = ActivationDtype::float32,
        .token_element = sizeof(float),
        .offset_codes = false,
        .pack_tokens = Steps::pack_tokens,
        .store = store_sums<float>,
        .direct_tokens = Tokens,
        .two_bit = {.direct = direct<Tokens>},
        .base3_recode = recode_base3,
    };
  }
};

/// @tparam Vectors Registers of output rows. @tparam Tokens Rows of x that share a load of weights.
/// @tparam Block k of a panel.
template <class Isa, int Vectors, int Tokens, int Block>
struct Float32Panels : Float32Steps<Isa> {
  using Steps = Float32Steps<Isa>;
  using Steps::kLanes;
  using typename Steps::Vector;
  using typename Steps::Words;
  static constexpr int kRows = Vectors * kLanes;
  static_assert(kRows % kTileRows == 0);

  template <int... K>
  static void unpack_step(Words words, float* panel, std::integer_sequence<int, K...>) {
    (Isa::store(panel + K * kRows, Steps::template weights<K>(words)), ...);
  }

  // The register of rows that begins `lane` rows into a tile.
  static std::uint32_t unpack_lanes(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t lane,
                                    std::int64_t step_begin, std::int64_t step_end, float* panel) {
    Words invalid = {};
    for (std::int64_t step = step_begin; step < step_end; ++step, panel += kStepCodes * kRows) {
      const Words words = Isa::load_words(tile + (step * tile_rows + lane) * 4);
      invalid = Isa::or_adjacent(invalid, words);
      unpack_step(words, panel, Steps::kEachCode);
    }
    return Steps::any_invalid(invalid, tile_rows - lane);
  }

  static std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                                    std::int64_t step_begin, std::int64_t step_end, void* panel) {
    std::uint32_t invalid = 0;
    for (std::int64_t row = 0; row < kRows; row += kLanes) {
      // A missing tile is read as the first one again: its sums are never stored.
      const std::int64_t tile = row < rows ? row / kTileRows * kTileRows : 0;
      const std::int64_t tile_rows = std::min(kTileRows, rows - tile);
      invalid |= unpack_lanes(tiles + tile * payload_row_bytes, tile_rows, row % kTileRows, step_begin, step_end,
                              static_cast<float*>(panel) + row);
    }
    return invalid;
  }

  template <int Count>
  static void gemm_step(const float* weights, const float* x, float* sums) {
    Vector chain[Count][Vectors];
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) chain[m][v] = Isa::broadcast(0.0f);
    }
    for (std::int64_t k = 0; k < kStepCodes; ++k, weights += kRows, x += Count) {
      Vector w[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) w[v] = Isa::load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < Count; ++m) {
        const Vector activation = Isa::broadcast(x[m]);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) Isa::multiply_add(chain[m][v], w[v], activation);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < Count; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) Steps::add_to(sums + m * kRows + v * kLanes, chain[m][v]);
    }
  }

  template <int Count>
  static void gemm_steps(const float* weights, const float* x, std::int64_t k_count, float* sums) {
    for (std::int64_t k = 0; k < k_count; k += kStepCodes) gemm_step<Count>(weights + k * kRows, x + k * Count, sums);
  }

  // Calls gemm_steps<tokens>.
  template <int Count = Tokens>
  static void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count,
                   const Groups* groups, void* sums) {
    if constexpr (Count > 1) {
      if (tokens < Count) return gemm<Count - 1>(panel, packed_tokens, tokens, k_count, groups, sums);
    }
    const auto* weights = static_cast<const float*>(panel);
    const auto* x = static_cast<const float*>(packed_tokens);
    multiply_by_groups<kRows, Count, float>(groups, Count, k_count, sums,
                                            [&](std::int64_t k, std::int64_t count, float* group) {
                                              gemm_steps<Count>(weights + k * kRows, x + k * Count, count, group);
                                            });
  }

  static constexpr TileFunctions added_to(TileFunctions functions) {
    functions.panels = {
        .rows = kRows, .token_tile = Tokens, .k_block = Block, .element = sizeof(float), .gemm = gemm<Tokens>};
    functions.two_bit.unpack_panel = unpack_panel;
    return functions;
  }
};

}  // namespace
}  // namespace bitcore
