// The contract between the shared driver (tiled_kernel.h) and the tile functions of one instruction set.
//
// Tile functions neither allocate, thread, dispatch nor throw; pointers never alias; every buffer that the driver
// provides is 64-byte aligned, packed activations excepted. Sums are int32 for int8 activations and float for float32
// activations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitcore/config.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// Bound of TileFunctions::direct_tokens: the driver keeps the sums of a tile on the stack.
inline constexpr std::int64_t kMostDirectTokens = 24;

/// Runs of tiles that direct_streams reads side by side, for so many tokens.
inline constexpr std::int64_t kMostStreams = 4;
constexpr std::int64_t streams_of(std::int64_t tokens) { return tokens == 1 ? kMostStreams : 2; }

/// What the driver knows of one row of x, or of one group of k of it.
struct Activation {
  float scale;          ///< s_x; float32 activations: 1, or NaN where the row is not finite.
  std::int32_t offset;  ///< Added to a sum: with offset_codes minus the sum of the int8 codes, otherwise 0.
};

/// Weights with a scale per group of k: the sums of every group are exact on their own, then scaled and added up in
/// order as floats, sum += float(sum of the group + x.offset) * (x.scale * w_scale).
struct Groups {
  std::int64_t k;         ///< Of a group: a multiple of 32. The last one may be shorter, by whole steps.
  const Activation* x;    ///< [group][token]
  std::int64_t x_stride;  ///< From one group to the next.
  const float* w_scale;   ///< [group][row] of the rows that are multiplied together; of several streams [stream] first.
};

/// A block of finished sums, and where they go. Arrays over rows are readable up to a multiple of 16 of them.
struct StoreBlock {
  const void* sums;          ///< [token][row]
  std::int64_t sums_stride;  ///< From one token to the next; a multiple of 16.
  std::int64_t tokens;
  std::int64_t rows;      ///< Adjacent output features.
  const Activation* x;    ///< One for each token; null: sums are floats, scaled already.
  const float* w_scale;   ///< One for each row, where x is.
  const float* bias;      ///< One for each row, or null.
  std::byte* y;           ///< Of the first token and row.
  std::int64_t y_stride;  ///< Bytes from one token to the next.
  DType dtype;            ///< Of y.
};

/// What reads packed weights of one layout. With `groups` (null: none; 2 bits only) all sums are floats.
struct LayoutFunctions {
  /// Unpacks steps [step_begin, step_end) of `rows` <= PanelFunctions::rows packed rows that begin at a tile; absent
  /// rows may become anything. Returns nonzero where a code is invalid.
  /// @param tiles First byte of the first tile. @param payload_row_bytes R of docs/packed-format.md.
  using UnpackPanel = std::uint32_t (*)(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                                        std::int64_t step_begin, std::int64_t step_end, void* panel);
  UnpackPanel unpack_panel = nullptr;

  /// sums[token * kTileRows + row] = a tile of `rows` packed rows times packed tokens, all k at once. Returns nonzero
  /// where a code is invalid.
  using Direct = std::uint32_t (*)(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps,
                                   const void* packed_tokens, std::int64_t tokens, const Groups* groups, void* sums);
  Direct direct = nullptr;

  /// Up to so many tokens direct_streams is used instead of direct.
  std::int64_t stream_tokens = 0;

  /// sums[(stream * tokens + token) * sums_stride + row] = streams_of(tokens) runs of `count` adjacent full tiles times
  /// packed tokens. The runs are far from each other in memory, which serves several streams faster than one. With
  /// groups, count is 1 and sums_stride kTileRows. Returns nonzero where a code is invalid.
  using DirectStreams = std::uint32_t (*)(const std::uint8_t* const* runs, std::int64_t count, std::int64_t steps,
                                          const void* packed_tokens, std::int64_t tokens, const Groups* groups,
                                          void* sums, std::int64_t sums_stride);
  DirectStreams direct_streams = nullptr;
};

/// Weights that are unpacked once and then multiplied with many tokens.
struct PanelFunctions {
  std::int64_t rows = 0;        ///< Output rows that gemm computes together; a multiple of kTileRows.
  std::int64_t token_tile = 0;  ///< Most rows of x that gemm computes together.
  /// Most k that one unpacked panel covers (whole groups, and whole steps of both layouts, where those are more).
  std::int64_t k_block = 0;
  std::int64_t element = 0;  ///< Bytes of one weight.

  /// sums[token * rows + row] += sum over k of panel and packed tokens. With `groups`, of which the first begins with
  /// the panel, sums are floats.
  void (*gemm)(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count,
               const Groups* groups, void* sums) = nullptr;
};

struct TileFunctions {
  ActivationDtype activation_dtype;

  // ---- x and y ----

  std::int64_t token_element;  ///< Bytes of one activation as pack_tokens writes it.

  /// Weights are multiplied as codes w + 1: Activation::offset, added to every sum, takes the 1 off again.
  bool offset_codes;

  /// Reorders `tokens` rows of x, `row_stride` bytes apart, k_count activations each (a multiple of 16, at 1.6 bits of
  /// 4), as gemm and direct read them.
  void (*pack_tokens)(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count, void* packed);

  /// y = float(sums + x.offset) * (x.scale * w_scale) + bias, or sums + bias.
  void (*store)(const StoreBlock& block);

  // ---- weights ----

  /// Most rows of x that direct computes together, up to kMostDirectTokens. Up to as many, direct is used instead of
  /// panels; without panels it serves any number of rows, so many at a time. 0: there is no direct.
  std::int64_t direct_tokens = 0;

  PanelFunctions panels = {};  ///< Without gemm there are none.

  LayoutFunctions two_bit = {};
  LayoutFunctions base3 = {};  ///< What is null here, the driver does on tiles that it rewrites at 2 bits first:

  /// Rewrites steps [step_begin, step_end) of one 1.6-bit tile as a 2-bit tile of ceil(20 / 16 * steps) steps, padded
  /// with code 1. Returns nonzero where a code is invalid. Null: the driver's own, compiled for any CPU.
  std::uint32_t (*base3_recode)(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t step_begin,
                                std::int64_t step_end, std::uint8_t* recoded) = nullptr;

  const LayoutFunctions& layout(Layout layout) const { return layout == Layout::base3 ? base3 : two_bit; }
};

}  // namespace bitcore
