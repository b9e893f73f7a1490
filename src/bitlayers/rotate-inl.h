// Rotary position embedding of one head.
#pragma once

#include "bitlayers/vector-inl.h"

namespace bitlayers {
namespace {

/// (a, b) become (a * cosine - b * sine, b * cosine + a * sine).
[[gnu::always_inline]] inline void rotate_pairs(Floats& a, Floats& b, const Floats& cosine, const Floats& sine) {
  const Floats first = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = first;
}

inline void rotate(float* x, const float* cosines, const float* sines, std::int64_t half) {
  float* y = x + half;
  std::int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Floats a = load(x + i), b = load(y + i);
    rotate_pairs(a, b, load(cosines + i), load(sines + i));
    store(x + i, a);
    store(y + i, b);
  }
  if (const std::int64_t left = half - i; left > 0) {
    Floats a = load_first(x + i, left), b = load_first(y + i, left);
    rotate_pairs(a, b, load_first(cosines + i, left), load_first(sines + i, left));
    store_first(x + i, left, a);
    store_first(y + i, left, b);
  }
}

}  // namespace
}  // namespace bitlayers
