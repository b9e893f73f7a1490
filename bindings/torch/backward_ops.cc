// The layer's backward: the engine's, with torch's matmul.
#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "bitcore/base/checks.h"
#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/torch_executor.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

// out = left @ right. The out form: autocast leaves it alone.
void multiply(ConstMatrixView left, bool transpose_left, ConstMatrixView right, MatrixView out) {
  const Tensor rows = borrowed(left);
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(transpose_left ? torch::stable::transpose(rows, 0, 1) : rows),
      torch::stable::detail::from(borrowed(right)), torch::stable::detail::from(borrowed(out))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // out once more, owned by the receiver
}

// The arguments, and the tensors that own what the views show.
struct Problem {
  Matrix dy;
  bitlinear::BackwardInputs inputs;
  BitQuantConfig config;
  std::vector<Tensor> owners = {};

  ConstMatrixView own(Matrix matrix) {
    owners.push_back(std::move(matrix.owner));
    return matrix.view;
  }
  ConstVectorView own(Scale scale) {
    owners.push_back(std::move(scale.owner));
    return scale.values;
  }
};

void take_weight(Problem& problem, const Tensor& qweight, const std::optional<Tensor>& scale,
                 std::int64_t in_features) {
  if (!scale.has_value()) throw QuantizationError("qweight_scale is None, qweight needs it");
  const std::int64_t out_features = qweight.size(0);
  problem.inputs.qweight = problem.own(any_weight(qweight, in_features));
  check_shape(problem.dy.view.rows, problem.dy.view.cols, problem.dy.view.rows, out_features, "dy");
  problem.inputs.qweight_scale =
      problem.own(weight_scale(*scale, "qweight_scale", out_features, in_features, problem.config));
}

void take_x(Problem& problem, const Tensor& x, const std::optional<Tensor>& scale, std::int64_t in_features,
            bool x_per_group) {
  const bool int8 = x.scalar_type() == ScalarType::Char;
  problem.inputs.qx = problem.own(int8 ? code_rows(x, "x") : floating_rows(x, "x"));
  check_shape(problem.inputs.qx.rows, problem.inputs.qx.cols, problem.dy.view.rows, in_features, "x");
  if (!int8) return;
  if (!scale.has_value()) throw QuantizationError("x_scale is None, int8 codes need it");
  problem.config.activation_dtype = ActivationDtype::int8;
  if (x_per_group) {
    problem.config.activation_granularity = Granularity::per_group;
  } else if (scale->dim() > 0) {
    problem.config.activation_granularity = Granularity::per_channel;
  }
  problem.inputs.x_scale = problem.own(x_scale(*scale, x, problem.config)).floats();
}

std::optional<Tensor> gradient(const Shape& shape, std::optional<ScalarType> dtype, const char* name) {
  if (!dtype.has_value()) return std::nullopt;
  check_floating_dtype(*dtype, name);
  return empty(shape, *dtype);
}

MatrixView view_of(const std::optional<Tensor>& gradient) {
  return gradient.has_value() ? output_rows(*gradient) : MatrixView();
}

Tensor or_nothing(std::optional<Tensor>& gradient) {
  return gradient.has_value() ? std::move(*gradient) : empty({0}, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bitlinear_backward(const Tensor& dy, std::optional<Tensor> x,
                                                      std::optional<Tensor> x_scale, std::optional<Tensor> qweight,
                                                      std::optional<Tensor> qweight_scale, std::int64_t in_features,
                                                      bool weight_per_channel, std::optional<ScalarType> dx_dtype,
                                                      std::optional<ScalarType> dweight_dtype,
                                                      std::optional<ScalarType> dbias_dtype, std::int64_t group_size,
                                                      bool x_per_group) {
  Problem problem = {gradient_rows(dy), {}, make_config(weight_per_channel, false, false, group_size)};
  if (qweight.has_value()) take_weight(problem, *qweight, qweight_scale, in_features);
  if (x.has_value()) take_x(problem, *x, x_scale, in_features, x_per_group);
  const std::int64_t out_features = problem.dy.view.cols;
  std::optional<Tensor> dx = gradient(replace_last(dy, in_features), dx_dtype, "dx_dtype");
  std::optional<Tensor> dweight = gradient({out_features, in_features}, dweight_dtype, "dweight_dtype");
  std::optional<Tensor> dbias = gradient({out_features}, dbias_dtype, "dbias_dtype");
  if (dx.has_value() && !qweight.has_value()) throw QuantizationError("qweight is None, dx needs it");
  if (dweight.has_value() && !x.has_value()) throw QuantizationError("x is None, dweight needs it");

  const bool narrow_bias = dbias.has_value() && *dbias_dtype != ScalarType::Float;
  std::vector<float> wide_bias(narrow_bias ? static_cast<std::size_t>(out_features) : 0);
  float* bias = narrow_bias ? wide_bias.data() : dbias.has_value() ? output_floats(*dbias).data() : nullptr;
  bitcore::bitlinear::backward(problem.dy.view, problem.inputs, problem.config, {view_of(dx), view_of(dweight), bias},
                               torch_executor(), multiply);
  if (narrow_bias) convert({wide_bias.data(), 1, out_features}, output_rows(*dbias));
  return {or_nothing(dx), or_nothing(dweight), or_nothing(dbias)};
}

}  // namespace bitcore::torch_ops
