// torch::stable tensors as the engine's views, with the checks that need a tensor: rank, dtype, strides. The engine
// checks everything else.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/ops/base.h"
#include "bitcore/tensor.h"

namespace bitcore::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<std::int64_t>;

/// A view, and the tensor that owns its memory: the argument itself, or a copy with suitable strides.
struct Matrix {
  Tensor owner;
  ConstMatrixView view;
};
struct Vector {
  std::optional<Tensor> owner;
  ConstVectorView view;
};
struct Scale {
  Tensor owner;
  ConstVectorView values;
};

/// @param group_size 0: weights have no scales per group. @param x_per_group Whether activations have.
BitQuantConfig make_config(bool weight_per_channel, bool int8_activations, bool x_per_channel,
                           std::int64_t group_size = 0, bool x_per_group = false);

/// The config of a weight alone, and of activations alone.
BitQuantConfig weight_config(bool per_channel, std::int64_t group_size);
BitQuantConfig x_config(bool per_channel, std::int64_t group_size);

/// Shape of the leading dimensions of x, followed by `last`.
Shape replace_last(const Tensor& x, std::int64_t last);

/// x of any rank from 1, leading dimensions flattened; floating.
Matrix floating_rows(const Tensor& x, const char* name);

/// A gradient of y, likewise.
Matrix gradient_rows(const Tensor& dy);

/// The same for int8 codes.
Matrix code_rows(const Tensor& qx, const char* name);

/// A floating matrix.
Matrix floating_matrix(const Tensor& weight, const char* name);

/// An int8 matrix; an error for packed bytes names unpack_weights.
Matrix code_matrix(const Tensor& qweight, const char* name);

/// A contiguous matrix of packed bytes, or of int8 codes where `allow_codes`.
Matrix packed_matrix(const Tensor& qweight, bool allow_codes);

/// A weight as any operator has it: packed, int8 codes, or floating; for this number of columns.
Matrix any_weight(const Tensor& qweight, std::int64_t in_features);

/// A floating vector of shape (size,), or none.
Vector floating_vector(const std::optional<Tensor>& tensor, std::int64_t size, const char* name);

/// Of a weight (rows, cols): float32; any one element per tensor; (rows,) or (rows, 1) per channel; float16 (rows,
/// groups) per group.
Scale weight_scale(const Tensor& scale, const char* name, std::int64_t rows, std::int64_t cols,
                   const BitQuantConfig& config);

/// float32; any one element per tensor; (*, 1) per channel; (*, groups) per group.
Scale x_scale(const Tensor& scale, const Tensor& x, const BitQuantConfig& config);

/// New tensors for what weight_scale and x_scale take.
Tensor empty_weight_scale(std::int64_t rows, std::int64_t cols, const BitQuantConfig& config);
Tensor empty_x_scale(const Tensor& x, const BitQuantConfig& config);

/// A dtype that quantization reads or writes: float32, bfloat16 or float16.
void check_floating_dtype(ScalarType dtype, const char* name);

/// An uninitialized, contiguous CPU tensor.
Tensor empty(const Shape& shape, ScalarType dtype);

/// A tensor whose memory is the view's: no longer in use when that goes.
Tensor borrowed(ConstMatrixView view);

/// A contiguous tensor as a matrix to write, leading dimensions flattened.
MatrixView output_rows(const Tensor& tensor);

/// A contiguous float32 tensor as floats to write.
std::span<float> output_floats(const Tensor& tensor);

/// A contiguous float32 or float16 tensor, flat.
VectorView output_vector(const Tensor& tensor);

}  // namespace bitcore::torch_ops
