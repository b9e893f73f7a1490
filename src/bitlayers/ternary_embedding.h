// A row of a packed ternary weight as floats: the embedding of a token.
#pragma once

#include <cstdint>

#include "bitcore/config.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

namespace bitlayers {

/// out[k] = weight of (row, k), -1, 0 or 1, times its scale.
/// @param packed uint8 (out_features, shape.row_bytes()), contiguous.
/// @param scale As in bitcore::forward: one, one per row, or float16 per row and group.
/// @param out shape.in_features floats.
/// @return Whether all codes of the row are valid; if not, `out` holds something.
bool ternary_row(bitcore::ConstMatrixView packed, const bitcore::PackedShape& shape, bitcore::ConstVectorView scale,
                 const bitcore::BitQuantConfig& config, std::int64_t row, float* out);

}  // namespace bitlayers
