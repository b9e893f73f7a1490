// The contract between the shared driver (tiled_kernel.h) and the tile functions of one instruction set.
//
// Tile functions neither allocate, thread, dispatch nor throw; pointers never alias; every buffer that the driver
// allocates is 64-byte aligned. Sums are int32 for int8 activations and float for float32 activations.
#pragma once

#include <cstdint>

#include "bitcore/config.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// Bound of TileFunctions::direct_tokens: the driver keeps the sums of a tile on the stack.
inline constexpr std::int64_t kMostDirectTokens = 16;

struct TileFunctions {
  ActivationDtype activation_dtype;

  std::int64_t panel_rows;  ///< Output rows that gemm computes together; a multiple of kTileRows.
  std::int64_t token_tile;  ///< Most rows of x that gemm computes together.
  std::int64_t k_block;     ///< k that one unpacked panel covers; a multiple of kStepCodes.
  std::int64_t
      direct_tokens;  ///< Most rows of x for which direct is used, up to kMostDirectTokens; 0: there is no direct.

  std::int64_t panel_element;  ///< Bytes of one weight in an unpacked panel.
  std::int64_t token_element;  ///< Bytes of one activation as pack_tokens writes it.

  /// Unpacked weights are codes w + 1: the driver starts the sums of a token at minus the sum of its activations.
  bool offset_codes;

  /// Bits of the largest magnitude of `count` floats; at or above those of infinity where one is not finite.
  std::uint32_t (*absmax)(const float* x, std::int64_t count);

  /// int8 only. codes = clamp(round(x / scale), -128, 127), 0 where scale is NaN; returns their sum.
  std::int32_t (*quantize)(const float* x, std::int64_t count, float scale, std::int8_t* codes);

  /// Reorders `tokens` rows of x, `row_stride` bytes apart, k_count activations each (a multiple of kStepCodes),
  /// as gemm reads them.
  void (*pack_tokens)(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count, void* packed);

  /// Unpacks steps [step_begin, step_end) of `rows` <= panel_rows packed rows that begin at a tile; absent rows may
  /// become anything. Returns nonzero where a code is invalid.
  /// @param tiles First byte of the first tile. @param payload_row_bytes R of docs/packed-format.md.
  std::uint32_t (*unpack_panel)(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                                std::int64_t step_begin, std::int64_t step_end, void* panel);

  /// sums[token * panel_rows + row] += sum over k of panel and packed tokens.
  void (*gemm)(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums);

  /// sums[token * kTileRows + row] += one tile of packed weights times packed tokens, all k at once.
  /// Returns nonzero where a code is invalid. Null where direct_tokens is 0.
  std::uint32_t (*direct)(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t steps,
                          const void* packed_tokens, std::int64_t tokens, void* sums);

  /// y = float(sums) * (x_scale * w_scale) + bias for `count` adjacent outputs. @param bias May be null.
  void (*store)(const void* sums, std::int64_t count, float x_scale, const float* w_scale, const float* bias, void* y,
                DType dtype);
};

}  // namespace bitcore
