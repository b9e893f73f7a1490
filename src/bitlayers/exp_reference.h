// The engine's exp of one float, operation by operation as exp-inl.h writes it down: what the vectors are tested
// against.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bitlayers/exp_constants.h"

namespace bitlayers {
namespace {

inline float exp_reference(float x) {
  using namespace exp_constants;
  if (std::isnan(x)) return x + x;
  if (x < kLowest) return 0.0f;
  if (x > kHighest) return std::numeric_limits<float>::infinity();
  const float shifted = std::fma(x, kLog2E, kShift);
  const float n = shifted - kShift;
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float p = kC6;
  p = std::fma(p, r, kC5);
  p = std::fma(p, r, kC4);
  p = std::fma(p, r, kC3);
  p = std::fma(p, r, kC2);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(n)) << 23;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) + exponent);
}

}  // namespace
}  // namespace bitlayers
