// The packed layouts that the library knows. Whatever tests or fuzzes packed bytes loops over them here.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "bitcore/exceptions.h"
#include "bitcore/ops/packing.h"

namespace bitcore::testing {

inline constexpr std::array kLayouts = {Layout::two_bit};

/// The layouts that exist for a shape.
inline std::vector<Layout> layouts_of(std::int64_t out_features, std::int64_t in_features) {
  std::vector<Layout> layouts;
  for (const Layout layout : kLayouts) {
    try {
      packed_shape(out_features, in_features, layout);
      layouts.push_back(layout);
    } catch (const QuantizationError&) {
    }
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
  }
  return false;
}

}  // namespace bitcore::testing
