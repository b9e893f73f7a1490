// The hyperbolic tangent, at most 2 units in the last place from the true value. docs/contract.md states the sequence.
#pragma once

#include "bitlayers/exp-inl.h"

namespace bitlayers {
namespace {

/// Below 0.625: t + t * (t^2 * P(t^2)), P fitted to (tanh(t) - t) / t^3.
[[gnu::always_inline]] inline Floats tanh_of_small(const Floats& t) {
  const Floats square = t * t;
  Floats p = all(0x1.18e200p-9f);
  p = fma(p, square, all(-0x1.0bf508p-7f));
  p = fma(p, square, all(0x1.638b5ap-6f));
  p = fma(p, square, all(-0x1.b9ee90p-5f));
  p = fma(p, square, all(0x1.111066p-3f));
  p = fma(p, square, all(-0x1.555554p-2f));
  return fma(p * square, t, t);
}

/// From 0.625 on: 1 - 2 / (exp(2 t) + 1), and from 10 on, where that rounds to 1, its value at 10.
[[gnu::always_inline]] inline Floats tanh_of_large(const Floats& t) {
  const Floats ten = all(10.0f), one = all(1.0f);
  const Floats bounded = select(ten < t, ten, t);  // NaN stays
  return one - all(2.0f) / (exp(bounded + bounded) + one);
}

[[gnu::always_inline]] inline Floats tanh(const Floats& x) {
  const Floats t = abs(x);
  const Floats magnitude = select(t < all(0.625f), tanh_of_small(t), tanh_of_large(t));
  return floats(bits(magnitude) | (bits(x) ^ bits(t)));
}

}  // namespace
}  // namespace bitlayers
