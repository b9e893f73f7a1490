// Which of a tensor's scales a row has.
#pragma once

#include <cstdint>
#include <span>

namespace bitcore {

/// One for all, or one for each row.
inline float scale_of_row(std::span<const float> scale, std::int64_t row) {
  return scale[scale.size() == 1 ? 0 : static_cast<std::size_t>(row)];
}

}  // namespace bitcore
