// The packed layouts that the library knows. Whatever tests or fuzzes packed bytes loops over them here.
#pragma once

#include <cstdint>
#include <vector>

#include "bitcore/ops/packing.h"

namespace bitcore::testing {

using bitcore::kLayouts;

/// The layouts that exist for so many columns.
inline std::vector<Layout> layouts_of(std::int64_t in_features) {
  std::vector<Layout> layouts;
  for (const Layout layout : kLayouts) {
    if (has_layout(in_features, layout)) layouts.push_back(layout);
  }
  return layouts;
}

/// Whether a byte of the payload holds codes 0, 1 and 2 only: docs/packed-format.md.
inline bool is_valid_payload_byte(Layout layout, std::uint8_t byte) {
  switch (layout) {
    case Layout::automatic:
      break;
    case Layout::two_bit:
      return (byte & (byte >> 1) & 0x55) == 0;
    case Layout::base3:
      return byte <= 242;
  }
  return false;
}

}  // namespace bitcore::testing
