// Layer functions as plain loops, element by element: what the others are tested against. Nothing is shared with them
// but the constants' values, which docs/contract.md states.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "bitcore/base/float_types-inl.h"
#include "bitlayers/exp_reference.h"
#include "bitlayers/layer_function_tables.h"

namespace bitlayers {
namespace {

// A sum in the contract's sixteen lanes.
class LaneSum {
 public:
  void add_product(std::int64_t index, float a, float b) {
    float& lane = lanes_[index % 16];
    lane = std::fma(a, b, lane);
  }
  float folded() {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes_[i] += lanes_[i + half];
    }
    return lanes_[0];
  }

 private:
  float lanes_[16] = {};
};

float element(const DenseMatrix& w, std::int64_t row, std::int64_t col) {
  const std::int64_t index = row * w.cols + col;
  if (w.dtype == bitcore::DType::int8) return static_cast<const std::int8_t*>(w.data)[index];
  return bitcore::widened(w.data, w.dtype, index);
}

float horner(float x, std::initializer_list<float> coefficients) {
  float sum = 0.0f;
  bool first = true;
  for (const float coefficient : coefficients) {
    sum = first ? coefficient : std::fma(sum, x, coefficient);
    first = false;
  }
  return sum;
}

float erf_of(float x) {
  if (std::isnan(x)) return x + x;
  const float t = std::fabs(x);
  if (t < 1.0f) {
    const float p = horner(t * t, {0x1.496a84p-14f, -0x1.a3f720p-11f, 0x1.5405b6p-8f, -0x1.b7f90ep-6f, 0x1.ce2cf8p-4f,
                                   -0x1.81273ep-2f, 0x1.06eba8p-3f});
    return std::copysign(std::fma(p, t, t), x);
  }
  const float bounded = t > 4.0f ? 4.0f : t;
  const float p = horner(bounded, {0x1.d4855ap-17f, -0x1.6fa0d8p-12f, 0x1.ec80c4p-9f, -0x1.8961bap-6f, 0x1.b459c4p-4f,
                                   0x1.451ab8p-1f, 0x1.20f21cp+0f});
  return std::copysign(1.0f - exp_reference(p * -bounded), x);
}

float tanh_of(float x) {
  if (std::isnan(x)) return x + x;
  const float t = std::fabs(x);
  if (t < 0.625f) {
    const float square = t * t;
    const float p = horner(
        square, {0x1.18e200p-9f, -0x1.0bf508p-7f, 0x1.638b5ap-6f, -0x1.b9ee90p-5f, 0x1.111066p-3f, -0x1.555554p-2f});
    return std::copysign(std::fma(p * square, t, t), x);
  }
  const float bounded = t > 10.0f ? 10.0f : t;
  return std::copysign(1.0f - 2.0f / (exp_reference(2.0f * bounded) + 1.0f), x);
}

float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::silu:
      return x / (1.0f + exp_reference(-x));
    case Activation::relu2: {
      const float positive = x < 0.0f ? 0.0f : x;  // NaN stays
      return positive * positive;
    }
    case Activation::gelu:
      return (0.5f * x) * (1.0f + erf_of(x * 0x1.6a09e6p-1f));
    case Activation::gelu_tanh: {
      const float cube = (x * x) * x;
      return (0.5f * x) * (1.0f + tanh_of(0x1.988454p-1f * (x + 0.044715f * cube)));
    }
  }
  return x;
}

void rms_norm(const float* x, const float* weight, std::int64_t count, float eps, float* y) {
  LaneSum squares;
  for (std::int64_t i = 0; i < count; ++i) squares.add_product(i, x[i], x[i]);
  const float reciprocal = 1.0f / std::sqrt(squares.folded() / static_cast<float>(count) + eps);
  for (std::int64_t i = 0; i < count; ++i) y[i] = (x[i] * reciprocal) * weight[i];
}

void rotate(float* x, const float* cosines, const float* sines, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    const float a_cosine = a * cosines[i], b_sine = b * sines[i], b_cosine = b * cosines[i], a_sine = a * sines[i];
    x[i] = a_cosine - b_sine;
    x[half + i] = b_cosine + a_sine;
  }
}

void activate(Activation activation, const float* gate, const float* up, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = activated(activation, gate[i]) * up[i];
}

void add_scaled(const float* x, float factor, std::int64_t count, float* h) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float term = x[i] * factor;
    h[i] += term;
  }
}

void scale(float factor, std::int64_t count, float* x) {
  for (std::int64_t i = 0; i < count; ++i) x[i] *= factor;
}

void dense(const DenseMatrix& w, std::int64_t first, std::int64_t last, const float* x, std::int64_t tokens,
           std::int64_t x_stride, float* y, std::int64_t y_stride) {
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t row = first; row < last; ++row) {
      LaneSum sum;
      for (std::int64_t k = 0; k < w.cols; ++k) sum.add_product(k, x[token * x_stride + k], element(w, row, k));
      const float product = sum.folded();
      y[token * y_stride + row - first] = w.dtype == bitcore::DType::int8 ? product * w.scale[row] : product;
    }
  }
}

void dense_row(const DenseMatrix& w, std::int64_t row, float* out) {
  for (std::int64_t k = 0; k < w.cols; ++k) {
    const float value = element(w, row, k);
    out[k] = w.dtype == bitcore::DType::int8 ? value * w.scale[row] : value;
  }
}

void exp_of_row(const float* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = exp_reference(in[i]);
}
void erf_of_row(const float* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = erf_of(in[i]);
}
void tanh_of_row(const float* in, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = tanh_of(in[i]);
}

}  // namespace

constinit const LayerFunctions kReferenceLayerFunctions = {
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

}  // namespace bitlayers
