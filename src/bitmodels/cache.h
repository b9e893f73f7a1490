// The cache of keys and values: blocks of 256 positions that sessions share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bitcore/base/aligned_array.h"
#include "bitlayers/attention_functions.h"

namespace bitmodels {

/// Where keys and values of a layer and a head lie in a block.
struct CacheLayout {
  CacheLayout(bitlayers::CacheForm form, std::int64_t layers, std::int64_t heads, std::int64_t head_dim);

  bitlayers::CacheForm form;
  std::int64_t heads;
  std::int64_t row_bytes;    ///< Of one position: head_dim elements.
  std::int64_t table_bytes;  ///< Of the keys, or the values, of one layer and head.
  std::int64_t scale_bytes;  ///< Of their scales; 0 unless int8.
  std::int64_t pair_bytes;   ///< Keys, values and their scales.
  std::int64_t block_bytes;
};

/// 256 positions of all layers and heads.
using CacheBlock = bitcore::AlignedArray<std::byte>;

/// The part of a block that one layer and head has.
struct CacheView {
  CacheView(const CacheLayout& layout, std::byte* block, std::int64_t layer, std::int64_t head);

  std::byte* keys;
  std::byte* values;
  float* key_scales;  ///< Null unless int8.
  float* value_scales;
};

/// The blocks of one session. Copies share them; what is written to must be its own.
class Cache {
 public:
  explicit Cache(const CacheLayout& layout) : layout_(layout) {}

  const CacheLayout& layout() const { return layout_; }
  /// Makes room for positions [first, last): blocks that are missing, and copies of those that others hold as well.
  /// @throws std::bad_alloc; then nothing has changed that matters.
  void reserve(std::int64_t first, std::int64_t last);
  /// Drops the blocks that hold positions from `position` on alone.
  void truncate(std::int64_t position);
  /// Block `index` of one layer and head.
  CacheView view(std::int64_t index, std::int64_t layer, std::int64_t head) const {
    return {layout_, blocks_[static_cast<std::size_t>(index)]->data(), layer, head};
  }

 private:
  CacheLayout layout_;
  std::vector<std::shared_ptr<CacheBlock>> blocks_;
};

}  // namespace bitmodels
