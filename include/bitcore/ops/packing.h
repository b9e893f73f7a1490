/// @file packing.h
/// The packed ternary weight: sizes, packing, unpacking, checks. Mirrors `bitcore.ops.packing`.
/// docs/packed-format.md describes the bytes.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "bitcore/executor.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// How the payload of a packed weight stores its codes. The values are those of the trailer's layout field.
enum class Layout : std::uint32_t {
  automatic = 0,  ///< A fixed rule of the shape, the same on every machine: two_bit for all. Never stored.
  two_bit = 1,    ///< "2bit": four codes in a byte, 2 bits each.
  base3 = 2,      ///< "1.6bit": five codes in a byte, the digits of a number in base 3.
};

/// The layouts that a packed weight can have.
inline constexpr Layout kLayouts[] = {Layout::two_bit, Layout::base3};

/// "auto", "2bit" or "1.6bit".
/// @throws QuantizationError for any other text.
Layout parse_layout(std::string_view text);

/// The inverse of parse_layout().
std::string_view to_string(Layout layout);

/// Codes of one row in one 32-bit word of the payload: 16 at 2 bits, 20 at 1.6 bits.
constexpr std::int64_t step_codes(Layout layout) { return layout == Layout::base3 ? 20 : 16; }

/// Whether a layout exists for this number of columns. 2bit always does; 1.6bit if its rows are smaller, as they always
/// are from 65 columns on: so in_features and the size of a row name the layout.
bool has_layout(std::int64_t in_features, Layout layout);

/// Largest in_features: above it an int32 sum of int8 products could overflow.
inline constexpr std::int64_t kMaxInFeatures = (std::int64_t{1} << 24) - 1;

/// Output rows that a tile interleaves.
inline constexpr std::int64_t kTileRows = 16;

/// Bytes of the trailer that carry something; zeros follow.
inline constexpr std::int64_t kTrailerBytes = 64;

/// Sizes of a packed weight of shape (out_features, payload_row_bytes + trailer_row_bytes).
struct PackedShape {
  std::int64_t out_features = 0;       ///< N, the rows
  std::int64_t in_features = 0;        ///< K
  std::int64_t payload_row_bytes = 0;  ///< R
  std::int64_t trailer_row_bytes = 0;  ///< T
  Layout layout = Layout::two_bit;     ///< Never automatic.

  /// 32-bit words of a row.
  std::int64_t steps() const { return payload_row_bytes / 4; }
  /// in_features, rounded up to whole steps.
  std::int64_t padded_in_features() const { return steps() * step_codes(layout); }
  /// Columns of the tensor.
  std::int64_t row_bytes() const { return payload_row_bytes + trailer_row_bytes; }
  /// Where the trailer begins.
  std::int64_t payload_bytes() const { return out_features * payload_row_bytes; }
  /// Of the whole tensor.
  std::int64_t bytes() const { return out_features * row_bytes(); }
};

/// @throws QuantizationError where a size is below 1, in_features is above kMaxInFeatures, or the layout does not exist
/// for in_features.
PackedShape packed_shape(std::int64_t out_features, std::int64_t in_features, Layout layout = Layout::automatic);

/// Packs int8 codes of shape (out_features, in_features) into `packed`, uint8 of shape
/// (out_features, packed_shape().row_bytes()), contiguous. Every byte is written.
/// @throws QuantizationError for a wrong shape, dtype, or a code that is not -1, 0 or 1.
void pack_weights(ConstMatrixView qweight, MatrixView packed, Layout layout = Layout::automatic);

/// The same into a new buffer.
std::vector<std::uint8_t> pack_weights(ConstMatrixView qweight, Layout layout = Layout::automatic);

/// How much of a packed weight is checked before it is read.
enum class Verify {
  every_byte,  ///< As check_qweight.
  trailer,     ///< As check_trailer; what an invalid code is unpacked as is unspecified (0, 1, 2 or -1).
};

/// Inverse of pack_weights: writes -1, 0 and 1 of shape (out_features, in_features), as int8 or a floating dtype.
/// @throws QuantizationError where the check fails, or `qweight` has a wrong shape or dtype.
void unpack_weights(ConstMatrixView packed, MatrixView qweight, Verify verify = Verify::every_byte,
                    Executor& executor = serial_executor());

/// Columns [first, first + columns.cols) of what unpack_weights with Verify::trailer writes.
/// @param first A multiple of step_codes() of the weight's layout.
/// @throws QuantizationError as unpack_weights, and for columns that do not exist.
void unpack_columns(ConstMatrixView packed, std::int64_t in_features, std::int64_t first, MatrixView columns,
                    Executor& executor = serial_executor());

/// Rewrites a packed weight in another layout.
std::vector<std::uint8_t> repack(ConstMatrixView packed, std::int64_t in_features, Layout layout);

/// Reads every byte of a packed weight: length, trailer, checksum, codes.
/// @throws QuantizationError that says what is damaged.
void check_qweight(ConstMatrixView packed, std::int64_t in_features);

/// The constant-time part of check_qweight: dtype, shape and trailer, not the payload. Returns sizes and layout.
/// @throws QuantizationError
PackedShape check_trailer(ConstMatrixView packed, std::int64_t in_features);

/// The trailer's checksum: with w_i the payload's little-endian 32-bit words, sum of w_i * P^i modulo 2^64,
/// P = 0x9E3779B97F4A7C15. P is odd, so that a change of any one word changes the sum.
std::uint64_t payload_checksum(const std::uint8_t* payload, std::int64_t bytes);

}  // namespace bitcore
