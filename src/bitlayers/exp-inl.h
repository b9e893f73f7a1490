// The engine's own exp: the same bits on every machine, whatever its C library does.
//
// For x from -87 to 88.72, every operation rounded once to float32:
//
//   t = fma(x, log2(e), 1.5 * 2^23)       the last bits of t are n = round(x * log2(e)) as an integer
//   n = t - 1.5 * 2^23                    exact
//   r = fma(n, -ln2_high, x)              exact: both are multiples of the last place of r, which is below 0.35
//   r = fma(n, -ln2_low, r)
//   p = c6
//   p = fma(p, r, c5), then c4, c3, c2    Horner, and
//   p = fma(p, r, 1), p = fma(p, r, 1)
//   result = p * 2^n, by adding n to the exponent of p
//
// n is 128 only where r < 0 and thus p < 1, and -126 only where p > 1, so that every result is a normal number, without
// overflow on the way. exp(0): n = 0, r = 0, p = 1. Below -87 the result is 0, above 88.72 infinity, of NaN it is NaN.
// Over all floats the result is less than 1 unit in the last place from the true value.
#pragma once

#include <limits>

#include "bitlayers/exp_constants.h"
#include "bitlayers/vector-inl.h"

namespace bitlayers {
namespace {

[[gnu::always_inline]] inline Floats exp(const Floats& x) {
  using namespace exp_constants;
  const Floats one = all(1.0f);
  const Floats shifted = fma(x, all(kLog2E), all(kShift));
  const Floats n = shifted - all(kShift);
  const Floats r = fma(n, all(-kLn2Low), fma(n, all(-kLn2High), x));
  Floats p = all(kC6);
  p = fma(p, r, all(kC5));
  p = fma(p, r, all(kC4));
  p = fma(p, r, all(kC3));
  p = fma(p, r, all(kC2));
  p = fma(p, r, one);
  p = fma(p, r, one);
  // The bits of 1.5 * 2^23 + n below the exponent's place: those of n; the others are shifted out.
  const Floats scaled = floats(bits(p) + shift_left<23>(bits(shifted)));
  const Floats finite = select(x < all(kLowest), all(0.0f), scaled);
  const Floats result = select(all(kHighest) < x, all(std::numeric_limits<float>::infinity()), finite);
  return select(unordered(x, x), x + x, result);  // the sum makes a NaN quiet
}

}  // namespace
}  // namespace bitlayers
