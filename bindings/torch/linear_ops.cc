// The layer: prepare_weights, inference, and the training forward that keeps what backward needs.
#include <string>

#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/torch_executor.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

std::string kernel_name(std::optional<StringArgument> kernel) {
  return kernel.has_value() ? take_string(*kernel) : std::string();
}

// y of shape (*, out_features).
Tensor empty_output(const Tensor& x, std::int64_t out_features, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  check_floating_dtype(dtype, "out_dtype");
  return empty(replace_last(x, out_features), dtype);
}

struct PreparedTensors {
  Tensor scale;    // (), (out_features,) or (out_features, groups)
  Tensor qweight;  // (out_features, row_bytes)
};

PreparedTensors prepare(ConstMatrixView weight, const BitQuantConfig& config, Layout layout,
                        bitlinear::NonFinite non_finite) {
  const PackedShape shape = packed_shape(weight.rows, weight.cols, layout);
  Tensor scale = empty_weight_scale(weight.rows, weight.cols, config);
  Tensor qweight = empty({shape.out_features, shape.row_bytes()}, ScalarType::Byte);
  bitlinear::prepare_weights_into(weight, config, layout, non_finite, output_vector(scale), output_rows(qweight),
                                  torch_executor());
  return {std::move(scale), std::move(qweight)};
}

}  // namespace

std::tuple<Tensor, Tensor> prepare_weights(const Tensor& weight, bool per_channel, StringArgument layout,
                                           std::int64_t group_size) {
  const Layout chosen = parse_layout(take_string(layout));
  const Matrix w = floating_matrix(weight, "weight");
  auto [scale, qweight] = prepare(w.view, weight_config(per_channel, group_size), chosen, bitlinear::NonFinite::reject);
  return {std::move(scale), std::move(qweight)};
}

Tensor bitlinear(const Tensor& x, const Tensor& qweight_scale, const Tensor& qweight, std::optional<Tensor> bias,
                 bool weight_per_channel, bool int8_activations, bool x_per_channel,
                 std::optional<ScalarType> out_dtype, std::optional<StringArgument> kernel, std::int64_t group_size,
                 bool x_per_group) {
  const std::string name = kernel_name(kernel);
  const BitQuantConfig config =
      make_config(weight_per_channel, int8_activations, x_per_channel, group_size, x_per_group);
  const Matrix rows = floating_rows(x, "x");
  const Matrix weights = packed_matrix(qweight, /*allow_codes=*/true);
  const Scale scale = weight_scale(qweight_scale, "qweight_scale", weights.view.rows, rows.view.cols, config);
  const Vector b = floating_vector(bias, weights.view.rows, "bias");
  Tensor y = empty_output(x, weights.view.rows, out_dtype);
  bitcore::bitlinear::forward(rows.view, scale.values, weights.view, b.view, config, output_rows(y),
                              {&torch_executor(), name});
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bitlinear_train(const Tensor& x, const Tensor& weight,
                                                                   std::optional<Tensor> bias, bool weight_per_channel,
                                                                   bool int8_activations, bool x_per_channel,
                                                                   std::optional<ScalarType> out_dtype,
                                                                   std::optional<StringArgument> kernel,
                                                                   std::int64_t group_size, bool x_per_group) {
  const std::string name = kernel_name(kernel);
  const BitQuantConfig config =
      make_config(weight_per_channel, int8_activations, x_per_channel, group_size, x_per_group);
  const Matrix rows = floating_rows(x, "x");
  const Matrix w = floating_matrix(weight, "weight");
  if (rows.view.cols != w.view.cols) {
    throw QuantizationError("x has " + std::to_string(rows.view.cols) + " features, weight expects " +
                            std::to_string(w.view.cols));
  }
  const Vector b = floating_vector(bias, w.view.rows, "bias");
  Tensor y = empty_output(x, w.view.rows, out_dtype);
  auto [w_scale, qweight] = prepare(w.view, config, Layout::automatic, bitlinear::NonFinite::keep);
  const ConstMatrixView packed = output_rows(qweight);
  const bitlinear::Options options = {&torch_executor(), name};
  if (!int8_activations) {
    bitcore::bitlinear::forward_quantized(rows.view, {}, output_vector(w_scale), packed, b.view, config, output_rows(y),
                                          options);
    return {y, empty({0}, ScalarType::Char), empty({0}, ScalarType::Float), qweight, w_scale};
  }
  Tensor scale = empty_x_scale(x, config);
  Tensor qx = empty(replace_last(x, rows.view.cols), ScalarType::Char);
  compute_x_scale(rows.view, config, output_floats(scale), torch_executor());
  quantize_x(rows.view, output_floats(scale), config, output_rows(qx), torch_executor());
  bitcore::bitlinear::forward_quantized(output_rows(qx), output_floats(scale), output_vector(w_scale), packed, b.view,
                                        config, output_rows(y), options);
  return {y, qx, scale, qweight, w_scale};
}

}  // namespace bitcore::torch_ops
