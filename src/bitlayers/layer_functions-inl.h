// The table of layer functions for the instruction set of the including file.
//
// In an unnamed namespace for the reason given in vector-inl.h.
#pragma once

#include "bitlayers/activations-inl.h"
#include "bitlayers/dense-inl.h"
#include "bitlayers/layer_functions.h"
#include "bitlayers/map-inl.h"
#include "bitlayers/norm-inl.h"
#include "bitlayers/rotate-inl.h"

namespace bitlayers {
namespace {

inline void exp_of_row(const float* in, std::int64_t count, float* out) {
  map(
      count, out, [](const Floats& x) { return exp(x); }, in);
}
inline void erf_of_row(const float* in, std::int64_t count, float* out) {
  map(
      count, out, [](const Floats& x) { return erf(x); }, in);
}
inline void tanh_of_row(const float* in, std::int64_t count, float* out) {
  map(
      count, out, [](const Floats& x) { return tanh(x); }, in);
}

constexpr LayerFunctions make_layer_functions() {
  return {
      .rms_norm = rms_norm,
      .rotate = rotate,
      .activate = activate,
      .add_scaled = add_scaled,
      .scale = scale,
      .dense = dense,
      .dense_row = dense_row,
      .exp = exp_of_row,
      .erf = erf_of_row,
      .tanh = tanh_of_row,
  };
}

}  // namespace
}  // namespace bitlayers
