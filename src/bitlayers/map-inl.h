// Loops over rows of floats, sixteen at a time.
#pragma once

#include "bitlayers/vector-inl.h"

namespace bitlayers {
namespace {

/// out[i] = function(in[i]...), which takes and returns Floats. `out` may be one of `in`.
template <class Function, class... In>
[[gnu::always_inline]] inline void map(std::int64_t count, float* out, const Function& function, const In*... in) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, function(load(in + i)...));
  if (i < count) store_first(out + i, count - i, function(load_first(in + i, count - i)...));
}

inline void add_scaled(const float* x, float factor, std::int64_t count, float* h) {
  const Floats factors = all(factor);
  const auto add = [&](const Floats& sum, const Floats& term) { return sum + term * factors; };
  map(count, h, add, h, x);
}

inline void scale(float factor, std::int64_t count, float* x) {
  const Floats factors = all(factor);
  const auto multiply = [&](const Floats& values) { return values * factors; };
  map(count, x, multiply, x);
}

}  // namespace
}  // namespace bitlayers
