// Which of a tensor's scales an element has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bitcore/base/checks.h"
#include "bitcore/base/float_types-inl.h"
#include "bitcore/base/math.h"
#include "bitcore/config.h"
#include "bitcore/tensor.h"

namespace bitcore {
namespace {

/// Scales of the groups that a matrix's rows are cut into; without groups a row is one.
struct Scales {
  ConstVectorView values;
  std::int64_t group_size;  // columns
  std::int64_t groups;      // of a row
  std::int64_t row_step;    // 0: all rows share theirs

  /// @param values One, one for each row, or `groups` for each row where `granularity` is per_group.
  Scales(ConstVectorView values, std::int64_t cols, Granularity granularity, const BitQuantConfig& config)
      : values(values),
        group_size(granularity == Granularity::per_group ? config.group_size : std::max<std::int64_t>(1, cols)),
        groups(ceil_div(cols, group_size)),
        row_step(granularity == Granularity::per_tensor ? 0 : groups) {}

  float at(std::int64_t row, std::int64_t group = 0) const {
    return widened(values.data, values.dtype, row * row_step + group);
  }

  /// Calls visit(first, count, scale) for columns [first, first + count) of a row, group by group.
  template <class Visit>
  void for_each_group(std::int64_t row, std::int64_t cols, const Visit& visit) const {
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t first = group * group_size;
      visit(first, std::min(group_size, cols - first), at(row, group));
    }
  }
};

/// Throws where one is not finite and positive.
inline void check_usable_scales(ConstVectorView scale) {
  for (std::int64_t i = 0; i < scale.size; ++i) {
    const float value = widened(scale.data, scale.dtype, i);
    if (!(std::isfinite(value) && value > 0.0f)) {
      fail("qweight_scale must be finite and positive, got ", value, " at ", i);
    }
  }
}

/// Kernels call it, as fail_invalid_code(), where they have met such a scale.
[[noreturn]] inline void fail_unusable_scale(ConstVectorView scale) {
  check_usable_scales(scale);
  fail("qweight_scale must be finite and positive, and changed while it was read");
}

inline Scales weight_scales(ConstVectorView values, std::int64_t in_features, const BitQuantConfig& config) {
  return {values, in_features, config.weight_granularity, config};
}

inline Scales x_scales(ConstVectorView values, std::int64_t in_features, const BitQuantConfig& config) {
  return {values, in_features, config.activation_granularity, config};
}

}  // namespace
}  // namespace bitcore
