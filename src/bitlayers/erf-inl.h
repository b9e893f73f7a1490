// The error function, at most 2 units in the last place from the true value. docs/contract.md states the sequence.
#pragma once

#include "bitlayers/exp-inl.h"

namespace bitlayers {
namespace {

/// Below 1: t + t * P(t^2), P fitted to erf(t) / t - 1.
[[gnu::always_inline]] inline Floats erf_of_small(const Floats& t) {
  const Floats square = t * t;
  Floats p = all(0x1.496a84p-14f);
  p = fma(p, square, all(-0x1.a3f720p-11f));
  p = fma(p, square, all(0x1.5405b6p-8f));
  p = fma(p, square, all(-0x1.b7f90ep-6f));
  p = fma(p, square, all(0x1.ce2cf8p-4f));
  p = fma(p, square, all(-0x1.81273ep-2f));
  p = fma(p, square, all(0x1.06eba8p-3f));
  return fma(p, t, t);
}

/// From 1 on: 1 - exp(-t * P(t)), P fitted to -log(1 - erf(t)) / t up to 4, where the result rounds to 1.
[[gnu::always_inline]] inline Floats erf_of_large(const Floats& t) {
  const Floats four = all(4.0f);
  const Floats bounded = select(four < t, four, t);  // NaN stays
  Floats p = all(0x1.d4855ap-17f);
  p = fma(p, bounded, all(-0x1.6fa0d8p-12f));
  p = fma(p, bounded, all(0x1.ec80c4p-9f));
  p = fma(p, bounded, all(-0x1.8961bap-6f));
  p = fma(p, bounded, all(0x1.b459c4p-4f));
  p = fma(p, bounded, all(0x1.451ab8p-1f));
  p = fma(p, bounded, all(0x1.20f21cp+0f));
  return all(1.0f) - exp(p * (all(0.0f) - bounded));
}

[[gnu::always_inline]] inline Floats erf(const Floats& x) {
  const Floats t = abs(x);
  const Floats magnitude = select(t < all(1.0f), erf_of_small(t), erf_of_large(t));
  return floats(bits(magnitude) | (bits(x) ^ bits(t)));
}

}  // namespace
}  // namespace bitlayers
