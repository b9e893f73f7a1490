// RMSNorm of one row.
#pragma once

#include "bitlayers/map-inl.h"

namespace bitlayers {
namespace {

inline void rms_norm(const float* x, const float* weight, std::int64_t count, float eps, float* y) {
  const Floats mean_square = all(dot(x, x, count)) / all(static_cast<float>(count));
  const Floats reciprocal = all(1.0f) / sqrt(mean_square + all(eps));
  const auto norm = [&](const Floats& values, const Floats& weights) { return values * reciprocal * weights; };
  map(count, y, norm, x, weight);
}

}  // namespace
}  // namespace bitlayers
