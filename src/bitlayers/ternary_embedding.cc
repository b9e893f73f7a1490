#include "bitlayers/ternary_embedding.h"

#include <algorithm>
#include <cassert>

#include "bitcore/base/scales.h"
#include "bitcore/packing/code_rows.h"

namespace bitlayers {
namespace {

using bitcore::PackedShape;

// Words that are unpacked at a time: their codes fit on the stack.
constexpr std::int64_t kSteps = 32;

// Codes of one row; word `step` of it lies word_stride bytes behind the one before.
class CodeReader {
 public:
  CodeReader(const void* payload, const PackedShape& shape, std::int64_t row) : shape_(shape) {
    const std::int64_t in_tile = row % bitcore::kTileRows, tile_first = row - in_tile;
    first_word_ = static_cast<const std::uint8_t*>(payload) + tile_first * shape.payload_row_bytes + in_tile * 4;
    word_stride_ = std::min(bitcore::kTileRows, shape.out_features - tile_first) * 4;
  }

  // out = codes - 1 of up to kSteps words from `step` on; false where one is invalid.
  bool read(std::int64_t step, float* out) const {
    const bitcore::CodeRows& functions = bitcore::code_rows();
    const bool base3 = shape_.layout == bitcore::Layout::base3;
    const std::int64_t width = bitcore::step_codes(shape_.layout);
    std::uint8_t codes[kSteps * bitcore::step_codes(bitcore::Layout::base3)];
    const std::uint32_t invalid = (base3 ? functions.unpack_base3 : functions.unpack_two_bit)(
        first_word_ + step * word_stride_, word_stride_, std::min(kSteps, shape_.steps() - step), codes);
    const std::int64_t first = step * width;
    const std::int64_t count = std::min(kSteps * width, shape_.in_features - first);
    functions.weights_of(codes, count, bitcore::DType::float32, out + first);
    return invalid == 0;
  }

 private:
  const PackedShape& shape_;
  const std::uint8_t* first_word_;
  std::int64_t word_stride_;
};

}  // namespace

bool ternary_row(bitcore::ConstMatrixView packed, const PackedShape& shape, bitcore::ConstVectorView scale,
                 const bitcore::BitQuantConfig& config, std::int64_t row, float* out) {
  assert(row >= 0 && row < shape.out_features);
  const CodeReader reader(packed.data, shape, row);
  bool valid = true;
  for (std::int64_t step = 0; step < shape.steps(); step += kSteps) valid &= reader.read(step, out);
  const auto multiply = [&](std::int64_t first, std::int64_t count, float factor) {
    for (std::int64_t k = first; k < first + count; ++k) out[k] *= factor;
  };
  bitcore::weight_scales(scale, shape.in_features, config).for_each_group(row, shape.in_features, multiply);
  return valid;
}

}  // namespace bitlayers
