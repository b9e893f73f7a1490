// Checks that forward and backward share.
#pragma once

#include <cstdint>
#include <span>

#include "bitcore/base/checks.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"

namespace bitcore::bitlinear {

inline void check_qweight_scale(std::span<const float> scale, std::int64_t out_features, const BitQuantConfig& config) {
  const auto size = static_cast<std::int64_t>(scale.size());
  check_span(scale, "qweight_scale");
  const std::int64_t expected = weight_scale_size(out_features, config);
  if (size != expected) {
    fail("qweight_scale has ", size, " elements, weight_granularity '", to_string(config.weight_granularity), "' with ",
         out_features, " out_features expects ", expected);
  }
}

// The view of its bytes is made from its shape.
inline void check_prepared(const PreparedWeights& weights) {
  const PackedShape& shape = weights.shape;
  if (static_cast<std::int64_t>(weights.qweight.size()) != shape.bytes()) {
    fail("weights.qweight has ", weights.qweight.size(), " bytes, weights.shape (", shape.out_features, ", ",
         shape.row_bytes(), ") takes ", shape.bytes());
  }
}

}  // namespace bitcore::bitlinear
