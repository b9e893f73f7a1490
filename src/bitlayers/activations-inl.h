// What a feed-forward layer does to its gate.
#pragma once

#include "bitlayers/erf-inl.h"
#include "bitlayers/exp-inl.h"
#include "bitlayers/layer_functions.h"
#include "bitlayers/map-inl.h"
#include "bitlayers/tanh-inl.h"

namespace bitlayers {
namespace {

[[gnu::always_inline]] inline Floats silu(const Floats& x) { return x / (all(1.0f) + exp(all(0.0f) - x)); }

[[gnu::always_inline]] inline Floats relu2(const Floats& x) {
  const Floats positive = max_or_nan(x, all(0.0f));
  return positive * positive;
}

[[gnu::always_inline]] inline Floats gelu(const Floats& x) {
  const Floats root_half = all(0x1.6a09e6p-1f);  // sqrt(1 / 2)
  return all(0.5f) * x * (all(1.0f) + erf(x * root_half));
}

[[gnu::always_inline]] inline Floats gelu_tanh(const Floats& x) {
  const Floats root_two_over_pi = all(0x1.988454p-1f);  // sqrt(2 / pi)
  const Floats cube = x * x * x;
  return all(0.5f) * x * (all(1.0f) + tanh(root_two_over_pi * (x + all(0.044715f) * cube)));
}

inline void activate(Activation activation, const float* gate, const float* up, std::int64_t count, float* out) {
  const auto apply = [&](const auto& function) {
    const auto gated = [&](const Floats& g, const Floats& u) { return function(g) * u; };
    map(count, out, gated, gate, up);
  };
  switch (activation) {
    case Activation::silu:
      return apply([](const Floats& x) { return silu(x); });
    case Activation::relu2:
      return apply([](const Floats& x) { return relu2(x); });
    case Activation::gelu:
      return apply([](const Floats& x) { return gelu(x); });
    case Activation::gelu_tanh:
      return apply([](const Floats& x) { return gelu_tanh(x); });
  }
}

}  // namespace
}  // namespace bitlayers
