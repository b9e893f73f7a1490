// The operators' CPU functions; library.cc registers them. Errors are the engine's exceptions.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace bitcore::torch_ops {

/// A string argument as the stable ABI hands it over: owned by the receiver. (TORCH_BOX's own conversion to std::string
/// leaks one string a call.)
using StringArgument = StringHandle;

/// Takes the argument's text and frees the argument.
std::string take_string(StringArgument argument);

// quantize_ops.cc
Tensor compute_weight_scale(const Tensor& weight, bool per_channel, std::int64_t group_size);
Tensor quantize_weight(const Tensor& weight, const Tensor& scale, bool per_channel, std::int64_t group_size);
Tensor dequantize_weight(const Tensor& qweight, const Tensor& scale, bool per_channel, std::int64_t group_size);
Tensor compute_x_scale(const Tensor& x, bool int8_activations, bool per_channel, std::int64_t group_size);
Tensor quantize_x(const Tensor& x, const Tensor& scale, bool per_channel, std::int64_t group_size);
Tensor dequantize_x(const Tensor& qx, const Tensor& scale, bool per_channel, std::int64_t group_size);
Tensor pack_weights(const Tensor& qweight, StringArgument layout);
Tensor unpack_weights(const Tensor& qweight, std::int64_t in_features, bool check);
void check_qweight(const Tensor& qweight, std::int64_t in_features);

// linear_ops.cc
std::tuple<Tensor, Tensor> prepare_weights(const Tensor& weight, bool per_channel, StringArgument layout,
                                           std::int64_t group_size);
Tensor bitlinear(const Tensor& x, const Tensor& qweight_scale, const Tensor& qweight, std::optional<Tensor> bias,
                 bool weight_per_channel, bool int8_activations, bool x_per_channel,
                 std::optional<ScalarType> out_dtype, std::optional<StringArgument> kernel, std::int64_t group_size,
                 bool x_per_group);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bitlinear_train(const Tensor& x, const Tensor& weight,
                                                                   std::optional<Tensor> bias, bool weight_per_channel,
                                                                   bool int8_activations, bool x_per_channel,
                                                                   std::optional<ScalarType> out_dtype,
                                                                   std::optional<StringArgument> kernel,
                                                                   std::int64_t group_size, bool x_per_group);

// backward_ops.cc
std::tuple<Tensor, Tensor, Tensor> bitlinear_backward(const Tensor& dy, std::optional<Tensor> x,
                                                      std::optional<Tensor> x_scale, std::optional<Tensor> qweight,
                                                      std::optional<Tensor> qweight_scale, std::int64_t in_features,
                                                      bool weight_per_channel, std::optional<ScalarType> dx_dtype,
                                                      std::optional<ScalarType> dweight_dtype,
                                                      std::optional<ScalarType> dbias_dtype, std::int64_t group_size,
                                                      bool x_per_group);

// kernel_ops.cc
std::string list_kernels();
std::int64_t kernel_tile_calls(StringArgument kernel);

}  // namespace bitcore::torch_ops
