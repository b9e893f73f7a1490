// The operations of a language model on rows of floats, compiled for several instruction sets: all give the same bits,
// those of docs/contract.md. They neither allocate, thread, dispatch nor throw; pointers of outputs alias no input
// unless a function says so; nothing is read or written beyond the counts.
#pragma once

#include <cstdint>

#include "bitcore/tensor.h"
#include "bitlayers/path.h"

namespace bitlayers {

/// What a feed-forward layer does to its gate.
enum class Activation {
  silu,       ///< x / (1 + exp(-x))
  relu2,      ///< t * t, t = max(x, 0); NaN stays
  gelu,       ///< 0.5 x (1 + erf(x / sqrt(2)))
  gelu_tanh,  ///< 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
};

/// A matrix that is not ternary: an embedding, a head.
struct DenseMatrix {
  const void* data = nullptr;  ///< (rows, cols), row-major, contiguous; of any alignment that its dtype has.
  bitcore::DType dtype = bitcore::DType::float32;  ///< float32, bfloat16, float16, or int8 with scales.
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const float* scale = nullptr;  ///< int8: one for each row.
};

struct LayerFunctions {
  /// y = x * (1 / sqrt(dot(x, x) / n + eps)) * weight, left to right. y may be x.
  void (*rms_norm)(const float* x, const float* weight, std::int64_t count, float eps, float* y);

  /// Rotation by halves, in place, of one head of 2 * half elements: (a, b) = (a * cos - b * sin, b * cos + a * sin),
  /// products and sums separate.
  void (*rotate)(float* x, const float* cosines, const float* sines, std::int64_t half);

  /// out = activation(gate) * up. out may be gate or up.
  void (*activate)(Activation activation, const float* gate, const float* up, std::int64_t count, float* out);

  /// h += x * factor: one product, one sum.
  void (*add_scaled)(const float* x, float factor, std::int64_t count, float* h);

  /// x *= factor.
  void (*scale)(float factor, std::int64_t count, float* x);

  /// y[token * y_stride + row - first] = dot(x of token, row of w), times the row's scale, for rows [first, last).
  /// `tokens` rows of x are `x_stride` elements apart.
  void (*dense)(const DenseMatrix& w, std::int64_t first, std::int64_t last, const float* x, std::int64_t tokens,
                std::int64_t x_stride, float* y, std::int64_t y_stride);

  /// The row as float32, times its scale.
  void (*dense_row)(const DenseMatrix& w, std::int64_t row, float* out);

  /// out = exp(in), of the sampler; erf(in) and tanh(in), for tests.
  void (*exp)(const float* in, std::int64_t count, float* out);
  void (*erf)(const float* in, std::int64_t count, float* out);
  void (*tanh)(const float* in, std::int64_t count, float* out);
};

/// Those of a path that this CPU supports.
const LayerFunctions& layer_functions(Path path);

}  // namespace bitlayers
