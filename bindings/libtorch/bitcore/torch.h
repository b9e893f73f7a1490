/// @file torch.h
/// The ternary linear layer for programs that use LibTorch: at::Tensor in and out, gradients by torch's autograd, and a
/// torch::nn module. Mirrors `bitcore.ops.bitlinear` and `bitlayers.BitLinear`.
///
/// Header-only: your own build compiles it against your LibTorch, 2.10 or newer; nothing else of bitcore needs torch.
/// Tensors are on the CPU, dense, of any strides. Every function checks its arguments and throws QuantizationError for
/// a device, layout, dtype or shape that does not fit. y has x's dtype, under autocast the autocast dtype; autocast
/// casts nothing else. All functions are re-entrant, and run on torch's threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"
#include "bitcore/torch_executor.h"

namespace bitcore::torch {

namespace detail {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw QuantizationError(text.str());
}

inline std::string_view name_of(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

inline bool is_per_channel(Granularity granularity) { return granularity == Granularity::per_channel; }

inline bool is_int8(const BitQuantConfig& config) { return config.activation_dtype == ActivationDtype::int8; }

/// A tensor, and one block of strided memory on a CPU.
inline void check_dense(const at::Tensor& tensor, const char* name) {
  if (!tensor.defined()) fail(name, " is undefined, expected a tensor");
  if (tensor.is_nested()) fail(name, " is a nested tensor, expected a dense one");
  if (tensor.layout() != at::kStrided) fail(name, " is a ", tensor.layout(), " tensor, expected a dense one");
}

inline void check_cpu(const at::Tensor& tensor, const char* name) {
  if (!tensor.is_cpu()) fail(name, " is on ", tensor.device(), ", expected cpu");
}

/// A defined tensor is dense and on the device of the first.
inline void check_beside(const at::Tensor& tensor, const char* name, const at::Tensor& first, const char* first_name) {
  check_dense(tensor, name);
  if (tensor.device() != first.device()) {
    fail(name, " is on ", tensor.device(), ", ", first_name, " is on ", first.device());
  }
}

inline DType floating_dtype(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      fail(name, " has dtype ", name_of(tensor.scalar_type()), ", expected float32, bfloat16 or float16");
  }
}

/// A view, and the tensor that owns its memory: the argument itself, or a copy with suitable strides.
struct Matrix {
  at::Tensor owner;
  ConstMatrixView view;
};

/// Rank 2, made to have adjacent elements in each row and rows that do not overlap.
inline Matrix matrix(const at::Tensor& tensor, DType dtype) {
  at::Tensor owner = tensor.detach().resolve_neg();
  const bool adjacent = owner.size(1) <= 1 || owner.stride(1) == 1;
  const bool apart = owner.size(0) <= 1 || owner.stride(0) >= owner.size(1);
  if (!adjacent || !apart) owner = owner.contiguous();
  const std::int64_t row_stride = owner.size(0) > 1 ? owner.stride(0) : owner.size(1);
  const ConstMatrixView view(owner.const_data_ptr(), dtype, owner.size(0), owner.size(1), row_stride);
  return {std::move(owner), view};
}

/// x of any rank from 1, leading dimensions flattened.
inline Matrix rows_of(const at::Tensor& x) {
  const DType dtype = floating_dtype(x, "x");
  if (x.dim() == 0) fail("x has 0 dimensions, expected at least 1");
  if (x.dim() == 2) return matrix(x, dtype);
  const std::int64_t rows = c10::multiply_integers(x.sizes().slice(0, static_cast<std::size_t>(x.dim() - 1)));
  return matrix(x.reshape({rows, x.size(-1)}), dtype);
}

/// A weight of any kind: rank 2, no side empty.
inline void check_weight_shape(const at::Tensor& weight, const char* name) {
  if (weight.dim() != 2) fail(name, " has ", weight.dim(), " dimensions, expected 2");
  if (weight.size(0) < 1) fail(name, " has 0 out_features, expected at least 1");
  if (weight.size(1) < 1) fail(name, " has 0 in_features, expected at least 1");
}

/// A floating weight whose sizes are within bounds.
inline Matrix weight_matrix(const at::Tensor& weight) {
  const DType dtype = floating_dtype(weight, "weight");
  check_weight_shape(weight, "weight");
  packed_shape(weight.size(0), weight.size(1));  // throws before anything of that size is copied
  return matrix(weight, dtype);
}

/// Packed bytes or int8 codes.
inline Matrix qweight_matrix(const at::Tensor& qweight) {
  const at::ScalarType dtype = qweight.scalar_type();
  if (dtype != at::kByte && dtype != at::kChar) {
    fail("qweight has dtype ", name_of(dtype), ", expected uint8 (packed) or int8 (codes)");
  }
  check_weight_shape(qweight, "qweight");
  return matrix(qweight.contiguous(), dtype == at::kByte ? DType::uint8 : DType::int8);
}

/// How autograd takes an argument that may be none: an undefined tensor it does not.
using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct Vector {
  at::Tensor owner;
  ConstVectorView view;
};

/// A floating vector of shape (size,), or none.
inline Vector bias_vector(const OptionalTensor& bias, std::int64_t size) {
  if (!bias.has_value()) return {};
  const DType dtype = floating_dtype(*bias, "bias");
  if (bias->sizes() != at::IntArrayRef{size}) fail("bias has shape ", bias->sizes(), ", expected [", size, "]");
  at::Tensor owner = bias->detach().resolve_neg().contiguous();
  const ConstVectorView view(owner.const_data_ptr(), dtype, size);
  return {std::move(owner), view};
}

struct Scale {
  at::Tensor owner;
  std::span<const float> values;
};

/// float32; any one element per tensor; (out_features,) or (out_features, 1) per channel.
inline Scale weight_scale(const at::Tensor& scale, std::int64_t out_features, const BitQuantConfig& config) {
  if (scale.scalar_type() != at::kFloat) {
    fail("qweight_scale has dtype ", name_of(scale.scalar_type()), ", expected float32");
  }
  const bool per_channel = is_per_channel(config.weight_granularity);
  const bool fits =
      per_channel ? scale.sizes() == at::IntArrayRef{out_features} || scale.sizes() == at::IntArrayRef{out_features, 1}
                  : scale.numel() == 1;
  if (!fits && per_channel) {
    fail("qweight_scale has shape ", scale.sizes(), ", expected [", out_features, "] for per_channel weights");
  }
  if (!fits) fail("qweight_scale has shape ", scale.sizes(), ", expected one element for per_tensor weights");
  at::Tensor owner = scale.detach().resolve_neg().contiguous();
  const std::span values(owner.const_data_ptr<float>(), static_cast<std::size_t>(owner.numel()));
  return {std::move(owner), values};
}

/// A contiguous tensor of rank 1 or more as a matrix to write, leading dimensions flattened.
inline MatrixView output_rows(const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  const DType dtype = type == at::kByte ? DType::uint8 : type == at::kChar ? DType::int8 : floating_dtype(tensor, "y");
  const std::int64_t cols = tensor.size(-1);
  return {tensor.mutable_data_ptr(), dtype, tensor.numel() / cols, cols, cols};
}

inline std::span<float> output_floats(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

inline at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, at::TensorOptions(dtype).device(at::kCPU));
}

inline std::vector<std::int64_t> replace_last(const at::Tensor& x, std::int64_t last) {
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape.back() = last;
  return shape;
}

/// y of shape (*, out_features).
inline at::Tensor empty_output(const at::Tensor& x, std::int64_t out_features) {
  const bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
  return empty(replace_last(x, out_features), autocast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type());
}

inline bitlinear::Options options() { return {.executor = &torch_executor(), .kernel = {}}; }

struct Prepared {
  at::Tensor scale;
  at::Tensor qweight;
};

inline Prepared prepare(const Matrix& weight, const BitQuantConfig& config, Layout layout,
                        bitlinear::NonFinite non_finite) {
  const PackedShape shape = packed_shape(weight.view.rows, weight.view.cols, layout);
  const bool per_channel = is_per_channel(config.weight_granularity);
  Prepared prepared = {empty(per_channel ? at::IntArrayRef{shape.out_features} : at::IntArrayRef{}, at::kFloat),
                       empty({shape.out_features, shape.row_bytes()}, at::kByte)};
  bitlinear::prepare_weights_into(weight.view, config, layout, non_finite, output_floats(prepared.scale),
                                  output_rows(prepared.qweight), torch_executor());
  return prepared;
}

// ---- the straight-through backward: dX = dY @ dq(W), dW = dY^T @ dq(x), db = sum over rows of dY ------------------
//
// Matmuls with the integer codes, the scales folded into dY; in float32 whatever the dtypes are, autocast's too, and
// rounded once to the dtype of the argument.

using ::torch::autograd::AutogradContext;
using ::torch::autograd::variable_list;

/// Inside, autocast changes nothing.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKey::AutocastCPU};
};

/// Gradients are recorded inside backward only for create_graph=true. Those of the straight-through estimator are no
/// derivatives of the forward: differentiating them again would give silently wrong numbers.
inline void refuse_second_derivative() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                              "bitlinear has no second derivative: call backward or grad without create_graph");
}

/// What backward needs of x and bias beside the saved tensors.
inline void keep_shapes(AutogradContext& context, const at::Tensor& x, const OptionalTensor& bias) {
  context.saved_data["in_features"] = x.size(-1);
  context.saved_data["x_dtype"] = x.scalar_type();
  if (bias.has_value()) context.saved_data["bias_dtype"] = bias->scalar_type();
}

inline at::Tensor x_gradient(AutogradContext& context, const at::Tensor& dy, const at::Tensor& qweight_scale,
                             const at::Tensor& qweight) {
  at::Tensor codes = qweight;
  if (qweight.scalar_type() == at::kByte) {
    codes = empty({qweight.size(0), context.saved_data["in_features"].toInt()}, at::kChar);
    unpack_weights(qweight_matrix(qweight).view, output_rows(codes), Verify::trailer);
  }
  const at::Tensor scale = qweight_scale.numel() == 1 ? qweight_scale.reshape({}) : qweight_scale.reshape({-1});
  const at::Tensor dx = at::matmul(dy.to(at::kFloat) * scale, codes.to(at::kFloat));
  return dx.to(context.saved_data["x_dtype"].toScalarType());
}

/// @param x_scale Undefined with float32 activations; then qx is x itself.
inline at::Tensor weight_gradient(AutogradContext& context, const at::Tensor& dy, const at::Tensor& qx,
                                  const at::Tensor& x_scale) {
  const at::Tensor scaled = x_scale.defined() ? dy.to(at::kFloat) * x_scale : dy.to(at::kFloat);
  const std::int64_t in_features = context.saved_data["in_features"].toInt();
  const at::Tensor rows = qx.reshape({-1, in_features}).to(at::kFloat);
  const at::Tensor dweight = at::matmul(scaled.reshape({-1, dy.size(-1)}).t(), rows);
  return dweight.to(context.saved_data["weight_dtype"].toScalarType());
}

/// Undefined where there is no bias, or nothing asks for its gradient. @param input The bias's place among the tensors.
inline at::Tensor bias_gradient(AutogradContext& context, const at::Tensor& dy, std::size_t input) {
  if (context.saved_data.count("bias_dtype") == 0 || !context.needs_input_grad(input)) return {};
  const at::Tensor dbias = dy.to(at::kFloat).reshape({-1, dy.size(-1)}).sum(0);
  return dbias.to(context.saved_data["bias_dtype"].toScalarType());
}

/// Inference with gradients for x and bias.
struct Inference : ::torch::autograd::Function<Inference> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& qweight_scale,
                            const at::Tensor& qweight, const OptionalTensor& bias, const BitQuantConfig& config) {
    const Matrix weights = qweight_matrix(qweight);
    const std::int64_t out_features = weights.view.rows;
    const Matrix rows = rows_of(x);
    const Scale scale = weight_scale(qweight_scale, out_features, config);
    const Vector b = bias_vector(bias, out_features);
    at::Tensor y = empty_output(x, out_features);
    bitlinear::forward(rows.view, scale.values, weights.view, b.view, config, output_rows(y), options());
    context->save_for_backward({qweight_scale, qweight});
    keep_shapes(*context, x, bias);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative();
    const WithoutAutocast guard;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& dy = gradients[0];
    variable_list results(5);
    if (context->needs_input_grad(0)) results[0] = x_gradient(*context, dy, saved[0], saved[1]);
    results[3] = bias_gradient(*context, dy, 3);
    return results;
  }
};

/// The training forward; keeps codes and packed weights for backward, not float copies.
struct Training : ::torch::autograd::Function<Training> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, const BitQuantConfig& config) {
    const Matrix w = weight_matrix(weight);
    const Matrix rows = rows_of(x);
    if (rows.view.cols != w.view.cols) fail("x has ", rows.view.cols, " features, weight expects ", w.view.cols);
    const Vector b = bias_vector(bias, w.view.rows);
    at::Tensor y = empty_output(x, w.view.rows);
    const Prepared weights = prepare(w, config, Layout::automatic, bitlinear::NonFinite::keep);
    const std::span<const float> scale = output_floats(weights.scale);
    at::Tensor qx = x, x_scale;
    if (is_int8(config)) {
      const bool per_channel = is_per_channel(config.activation_granularity);
      x_scale = per_channel ? empty(replace_last(x, 1), at::kFloat) : empty({}, at::kFloat);
      qx = empty(x.sizes(), at::kChar);
      compute_x_scale(rows.view, config, output_floats(x_scale), torch_executor());
      quantize_x(rows.view, output_floats(x_scale), config, output_rows(qx), torch_executor());
      bitlinear::forward_quantized(output_rows(qx), output_floats(x_scale), scale, output_rows(weights.qweight), b.view,
                                   config, output_rows(y), options());
    } else {
      bitlinear::forward_quantized(rows.view, {}, scale, output_rows(weights.qweight), b.view, config, output_rows(y),
                                   options());
    }
    context->save_for_backward({qx, x_scale, weights.scale, weights.qweight});
    keep_shapes(*context, x, bias);
    context->saved_data["weight_dtype"] = weight.scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative();
    const WithoutAutocast guard;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& dy = gradients[0];
    variable_list results(4);
    if (context->needs_input_grad(0)) results[0] = x_gradient(*context, dy, saved[2], saved[3]);
    if (context->needs_input_grad(1)) results[1] = weight_gradient(*context, dy, saved[0], saved[1]);
    results[2] = bias_gradient(*context, dy, 2);
    return results;
  }
};

}  // namespace detail

/// Weights ready for inference, as bitlinear::PreparedWeights.
struct PreparedWeights {
  at::Tensor scale;    ///< float32, () per tensor, (out_features,) per channel.
  at::Tensor qweight;  ///< uint8 (out_features, packed_shape().row_bytes()): the bytes that Python reads and writes.
};

/// Scale, ternary codes and packing in one go. Carries no gradient.
/// @param weight (out_features, in_features), float32, bfloat16 or float16; finite.
/// @throws QuantizationError
inline PreparedWeights prepare_weights(const at::Tensor& weight, const BitQuantConfig& config,
                                       Layout layout = Layout::automatic) {
  detail::check_dense(weight, "weight");
  detail::check_cpu(weight, "weight");
  auto [scale, qweight] = detail::prepare(detail::weight_matrix(weight), config, layout, bitlinear::NonFinite::reject);
  return {std::move(scale), std::move(qweight)};
}

/// Inference. x and bias get their gradients.
/// @param x (*, in_features), float32, bfloat16 or float16; also of rank 1, also without rows.
/// @param qweight_scale float32; one element per tensor, (out_features,) or (out_features, 1) per channel.
/// @param qweight As prepare_weights returns it, or int8 codes (out_features, in_features), which are packed on every
///     call (slow).
/// @param bias (out_features,), floating; undefined: none.
/// @return (*, out_features).
/// @throws QuantizationError, KernelNotFoundError
inline at::Tensor forward(const at::Tensor& x, const at::Tensor& qweight_scale, const at::Tensor& qweight,
                          const at::Tensor& bias, const BitQuantConfig& config) {
  detail::check_dense(x, "x");
  detail::check_beside(qweight_scale, "qweight_scale", x, "x");
  detail::check_beside(qweight, "qweight", x, "x");
  if (bias.defined()) detail::check_beside(bias, "bias", x, "x");
  detail::check_cpu(x, "x");
  return detail::Inference::apply(x, qweight_scale, qweight, detail::optional(bias), config);
}

/// The same with prepared weights.
inline at::Tensor forward(const at::Tensor& x, const PreparedWeights& weights, const at::Tensor& bias,
                          const BitQuantConfig& config) {
  return forward(x, weights.scale, weights.qweight, bias, config);
}

/// Training forward: quantizes x and weight, computes y with the bits that inference on the prepared weights returns
/// (int8 activations). x, weight and bias get the straight-through gradients. A weight that is not finite gives NaN.
/// @param weight (out_features, in_features), float32, bfloat16 or float16.
/// @throws QuantizationError, KernelNotFoundError
inline at::Tensor forward_training(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                   const BitQuantConfig& config) {
  detail::check_dense(x, "x");
  detail::check_beside(weight, "weight", x, "x");
  if (bias.defined()) detail::check_beside(bias, "bias", x, "x");
  detail::check_cpu(x, "x");
  return detail::Training::apply(x, weight, detail::optional(bias), config);
}

/// A torch::nn::Linear with ternary weights. Trainable until deploy(): it then quantizes `weight` in every forward, in
/// evaluation mode too. Deployed it holds packed weights only, and x and bias still get gradients.
class BitLinearImpl : public ::torch::nn::Module {
 public:
  /// Initialized as torch::nn::Linear is.
  BitLinearImpl(std::int64_t in_features, std::int64_t out_features, const BitQuantConfig& config = {},
                bool with_bias = true)
      : config(config) {
    packed_shape(out_features, in_features);  // throws for sizes out of bounds
    weight = register_parameter("weight", at::empty({out_features, in_features}));
    bias = with_bias ? register_parameter("bias", at::empty({out_features}))
                     : register_parameter("bias", at::Tensor(), /*requires_grad=*/false);
    const double bound = 1.0 / std::sqrt(static_cast<double>(in_features));
    const at::NoGradGuard no_grad;
    weight.uniform_(-bound, bound);
    if (with_bias) bias.uniform_(-bound, bound);
  }

  /// y (*, out_features) of x (*, in_features): trains until the layer is deployed, then infers.
  at::Tensor forward(const at::Tensor& x) {
    return is_deployed() ? torch::forward(x, qweight_scale, qweight, bias, config)
                         : torch::forward_training(x, weight, bias, config);
  }

  /// Whether the layer holds packed weights only.
  bool is_deployed() const { return qweight.defined(); }

  /// Packs the weight for good: `weight` goes, `qweight` and `qweight_scale` come, evaluation mode is set.
  /// @throws QuantizationError where the layer is deployed already, or the weight is not finite.
  void deploy() {
    if (is_deployed()) throw QuantizationError("deploy: the layer is deployed already");
    auto [scale, packed] = prepare_weights(weight, config);
    qweight_scale = register_buffer("qweight_scale", std::move(scale));
    qweight = register_buffer("qweight", std::move(packed));
    parameters_.erase("weight");
    weight.reset();
    train(false);
  }

  /// @throws QuantizationError for training of a deployed layer: its float weight is gone.
  void train(bool on = true) override {
    if (on && is_deployed()) throw QuantizationError("train: the layer is deployed and has no float weight to train");
    Module::train(on);
  }

  using Module::to;
  /// As every module, but the packed weight and its scale keep their dtypes.
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override {
    keep_packed([&] { Module::to(device, dtype, non_blocking); });
  }
  /// The same.
  void to(at::ScalarType dtype, bool non_blocking = false) override {
    keep_packed([&] { Module::to(dtype, non_blocking); });
  }

  BitQuantConfig config;     ///< Once deployed, weight_granularity has to stay.
  at::Tensor weight;         ///< (out_features, in_features); undefined once deployed.
  at::Tensor bias;           ///< (out_features,), or undefined.
  at::Tensor qweight_scale;  ///< float32, whatever the layer is cast to; undefined until deployed.
  at::Tensor qweight;        ///< uint8; undefined until deployed.

 private:
  // Module::to casts every buffer, bytes too: they are put back.
  template <class Cast>
  void keep_packed(const Cast& cast) {
    if (!is_deployed()) return cast();
    const at::Tensor scale = qweight_scale.detach(), packed = qweight.detach();
    cast();
    qweight_scale.set_data(scale.to(qweight_scale.device()));
    qweight.set_data(packed.to(qweight.device()));
  }
};

/// What torch's modules hold and share; see torch::nn::ModuleHolder.
class BitLinear : public ::torch::nn::ModuleHolder<BitLinearImpl> {
 public:
  using ::torch::nn::ModuleHolder<BitLinearImpl>::ModuleHolder;
  using Impl = BitLinearImpl;  ///< As torch::nn::ModuleHolder expects it.
};

}  // namespace bitcore::torch
