#include "bitmodels/cache.h"

#include <algorithm>

#include "bitcore/base/math.h"

namespace bitmodels {

using bitlayers::kBlockPositions;

namespace {

std::int64_t whole_lines(std::int64_t bytes) {
  return bitcore::round_up(bytes, static_cast<std::int64_t>(bitcore::kCacheLine));
}

}  // namespace

CacheLayout::CacheLayout(bitlayers::CacheForm form, std::int64_t layers, std::int64_t heads, std::int64_t head_dim)
    : form(form),
      heads(heads),
      row_bytes(head_dim * bitlayers::element_bytes(form)),
      table_bytes(whole_lines(kBlockPositions * row_bytes)),
      scale_bytes(form == bitlayers::CacheForm::int8 ? kBlockPositions * std::int64_t{sizeof(float)} : 0),
      pair_bytes(2 * (table_bytes + scale_bytes)),
      block_bytes(layers * heads * pair_bytes) {}

CacheView::CacheView(const CacheLayout& layout, std::byte* block, std::int64_t layer, std::int64_t head)
    : keys(block + (layer * layout.heads + head) * layout.pair_bytes),
      values(keys + layout.table_bytes),
      key_scales(layout.scale_bytes == 0 ? nullptr : reinterpret_cast<float*>(values + layout.table_bytes)),
      value_scales(layout.scale_bytes == 0 ? nullptr : key_scales + kBlockPositions) {}

void Cache::reserve(std::int64_t first, std::int64_t last) {
  for (std::int64_t index = first / kBlockPositions; index * kBlockPositions < last; ++index) {
    const auto place = static_cast<std::size_t>(index);
    if (place < blocks_.size() && blocks_[place].use_count() == 1) continue;
    auto block = std::make_shared<CacheBlock>(layout_.block_bytes);
    if (place == blocks_.size()) {
      blocks_.push_back(std::move(block));
    } else {
      std::copy_n(blocks_[place]->data(), layout_.block_bytes, block->data());
      blocks_[place] = std::move(block);
    }
  }
}

void Cache::truncate(std::int64_t position) {
  const auto needed = static_cast<std::size_t>(bitcore::ceil_div(position, kBlockPositions));
  if (needed < blocks_.size()) blocks_.resize(needed);
}

}  // namespace bitmodels
