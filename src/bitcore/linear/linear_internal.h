// Checks that forward and backward share.
#pragma once

#include <cstdint>
#include <span>

#include "bitcore/base/checks.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"

namespace bitcore::bitlinear {

inline void check_qweight_scale(ConstVectorView scale, std::int64_t out_features, std::int64_t in_features,
                                const BitQuantConfig& config) {
  const std::int64_t expected = weight_scale_size(out_features, in_features, config);
  check_dtype(scale.dtype, weight_scale_dtype(config), "qweight_scale");
  check_view(scale, "qweight_scale");
  if (scale.size == expected) return;
  const bool groups = config.weight_granularity == Granularity::per_group;
  fail("qweight_scale has ", scale.size, " elements, weight_granularity '", to_string(config.weight_granularity),
       groups ? "' in groups of " + std::to_string(config.group_size) : "'", " with ", out_features, " out_features",
       groups ? " and " + std::to_string(in_features) + " in_features" : "", " expects ", expected);
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
