/// @file torch.h
/// The ternary linear layer for programs that use LibTorch: at::Tensor in and out, gradients by torch's autograd, and a
/// torch::nn module. Mirrors `bitcore.ops.bitlinear` and `bitlayers.BitLinear`.
///
/// Header-only: your own build compiles it against your LibTorch, 2.10 or newer; nothing else of bitcore needs torch.
/// Tensors are on the CPU, dense, of any strides. Every function throws QuantizationError for a device, layout, dtype
/// or shape that does not fit. y has x's dtype, under autocast the autocast dtype; autocast casts nothing else. All
/// functions are re-entrant, and run on torch's threads.
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

// A tensor as the engine's view. What a view cannot say is checked here: device, layout, rank, dtypes that the engine
// does not have. The engine checks everything else.

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw QuantizationError(text.str());
}

/// A tensor of one block of strided memory on a CPU.
inline void check_readable(const at::Tensor& tensor, const char* name) {
  if (!tensor.defined()) fail(name, " is undefined, expected a tensor");
  if (tensor.is_nested()) fail(name, " is a nested tensor, expected a dense one");
  if (tensor.layout() != at::kStrided) fail(name, " is a ", tensor.layout(), " tensor, expected a dense one");
  if (!tensor.is_cpu()) fail(name, " is on ", tensor.device(), ", expected cpu");
}

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    case at::kChar:
      return DType::int8;
    case at::kByte:
      return DType::uint8;
    default:
      fail(name, " has dtype ", c10::getDtypeNames(tensor.scalar_type()).first,
           ", expected float32, bfloat16, float16, int8 or uint8");
  }
}

/// A view, and the tensor that owns its memory: the argument itself, or a copy with suitable strides.
struct Matrix {
  at::Tensor owner;
  ConstMatrixView view;
};

/// Rank 2, made to have adjacent elements in each row and rows that do not overlap.
inline Matrix matrix(const at::Tensor& tensor, const char* name) {
  check_readable(tensor, name);
  const DType dtype = dtype_of(tensor, name);
  if (tensor.dim() != 2) fail(name, " has ", tensor.dim(), " dimensions, expected 2");
  at::Tensor owner = tensor.detach().resolve_neg();
  const bool adjacent = owner.size(1) <= 1 || owner.stride(1) == 1;
  const bool apart = owner.size(0) <= 1 || owner.stride(0) >= owner.size(1);
  if (!adjacent || !apart || dtype == DType::uint8) owner = owner.contiguous();  // packed bytes have no strides
  const std::int64_t row_stride = owner.size(0) > 1 ? owner.stride(0) : owner.size(1);
  const ConstMatrixView view(owner.const_data_ptr(), dtype, owner.size(0), owner.size(1), row_stride);
  return {std::move(owner), view};
}

/// A tensor of any rank from 1, leading dimensions flattened.
inline Matrix rows_of(const at::Tensor& x, const char* name) {
  check_readable(x, name);
  if (x.dim() == 0) fail(name, " has 0 dimensions, expected at least 1");
  const std::int64_t rows = c10::multiply_integers(x.sizes().slice(0, static_cast<std::size_t>(x.dim() - 1)));
  return matrix(x.dim() == 2 ? x : x.reshape({rows, x.size(-1)}), name);
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

/// Rank 1, or none.
inline Vector vector(const OptionalTensor& tensor, const char* name) {
  if (!tensor.has_value()) return {};
  check_readable(*tensor, name);
  const DType dtype = dtype_of(*tensor, name);
  if (tensor->dim() != 1) fail(name, " has ", tensor->dim(), " dimensions, expected 1");
  at::Tensor owner = tensor->detach().resolve_neg().contiguous();
  const ConstVectorView view(owner.const_data_ptr(), dtype, owner.size(0));
  return {std::move(owner), view};
}

struct Scale {
  at::Tensor owner;
  ConstVectorView values;
};

/// The elements of a tensor of any rank.
inline Scale scale_of(const at::Tensor& scale, const char* name, DType expected = DType::float32) {
  check_readable(scale, name);
  if (scale.scalar_type() != (expected == DType::float16 ? at::kHalf : at::kFloat)) {
    fail(name, " has dtype ", c10::getDtypeNames(scale.scalar_type()).first, ", expected ", to_string(expected));
  }
  at::Tensor owner = scale.detach().resolve_neg().contiguous();
  const ConstVectorView values(owner.const_data_ptr(), expected, owner.numel());
  return {std::move(owner), values};
}

/// Of a weight for x (*, in_features).
inline Scale weight_scale_of(const at::Tensor& scale, const at::Tensor& x, std::int64_t out_features,
                             const BitQuantConfig& config) {
  if (config.weight_granularity == Granularity::per_group && scale.defined() && x.dim() > 0 && x.size(-1) > 0) {
    const std::int64_t groups = weight_groups(x.size(-1), config);
    if (scale.dim() != 2 || scale.size(0) != out_features || scale.size(1) != groups) {
      fail("qweight_scale has shape ", scale.sizes(), ", expected [", out_features, ", ", groups, "] for groups of ",
           config.group_size);
    }
  }
  return scale_of(scale, "qweight_scale", weight_scale_dtype(config));
}

/// A contiguous tensor of rank 1 or more as a matrix to write, leading dimensions flattened; undefined: none.
inline MatrixView output_rows(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  const std::int64_t cols = tensor.size(-1);
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "y"), cols > 0 ? tensor.numel() / cols : 0, cols, cols};
}

inline std::span<float> output_floats(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

/// A tensor whose memory is the view's.
inline at::Tensor borrowed(ConstMatrixView view) {
  const at::ScalarType dtype = view.dtype == DType::bfloat16 ? at::kBFloat16 : at::kFloat;
  return at::from_blob(const_cast<void*>(view.data), {view.rows, view.cols}, {view.row_stride, 1},
                       at::TensorOptions(dtype).device(at::kCPU));
}

/// A contiguous float32 or float16 tensor, flat.
inline VectorView output_vector(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "scale"), tensor.numel()};
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

inline bool is_int8(const BitQuantConfig& config) { return config.activation_dtype == ActivationDtype::int8; }

struct Prepared {
  at::Tensor scale;
  at::Tensor qweight;
};

inline Prepared prepare(const at::Tensor& weight, const BitQuantConfig& config, Layout layout,
                        bitlinear::NonFinite non_finite) {
  const Matrix w = matrix(weight, "weight");
  const PackedShape shape = packed_shape(w.view.rows, w.view.cols, layout);
  std::vector<std::int64_t> scale_shape;
  if (config.weight_granularity != Granularity::per_tensor) scale_shape = {shape.out_features};
  const bool groups = config.weight_granularity == Granularity::per_group;
  if (groups) scale_shape.push_back(weight_groups(shape.in_features, config));
  Prepared prepared = {empty(scale_shape, groups ? at::kHalf : at::kFloat),
                       empty({shape.out_features, shape.row_bytes()}, at::kByte)};
  bitlinear::prepare_weights_into(w.view, config, layout, non_finite, output_vector(prepared.scale),
                                  output_rows(prepared.qweight), torch_executor());
  return prepared;
}

// ---- gradients: the engine's backward, with torch's matmul --------------------------------------------------------

using ::torch::autograd::AutogradContext;
using ::torch::autograd::variable_list;

/// The out form, which autocast leaves alone.
inline void multiply(ConstMatrixView left, bool transpose_left, ConstMatrixView right, MatrixView out) {
  const at::Tensor rows = borrowed(left);
  at::Tensor product = borrowed(out);
  at::mm_out(product, transpose_left ? rows.t() : rows, borrowed(right));
}

/// Gradients are recorded inside backward only for create_graph=true. Those of the straight-through estimator are no
/// derivatives of the forward: differentiating them again would give silently wrong numbers.
inline void refuse_second_derivative() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                              "bitlinear has no second derivative: call backward or grad without create_graph");
}

/// What backward needs beside the saved tensors.
inline void keep(AutogradContext& context, const at::Tensor& x, const OptionalTensor& bias,
                 const BitQuantConfig& config) {
  context.saved_data["x_shape"] = x.sizes();
  context.saved_data["x_dtype"] = x.scalar_type();
  if (bias.has_value()) context.saved_data["bias_dtype"] = bias->scalar_type();
  context.saved_data["weight_granularity"] = static_cast<std::int64_t>(config.weight_granularity);
  context.saved_data["activation_dtype"] = static_cast<std::int64_t>(config.activation_dtype);
  context.saved_data["activation_granularity"] = static_cast<std::int64_t>(config.activation_granularity);
  context.saved_data["group_size"] = config.group_size;
}

inline BitQuantConfig kept_config(AutogradContext& context) {
  const auto kept = [&](const char* name) { return context.saved_data[name].toInt(); };
  return {static_cast<Granularity>(kept("weight_granularity")), static_cast<ActivationDtype>(kept("activation_dtype")),
          static_cast<Granularity>(kept("activation_granularity")), kept("group_size")};
}

/// Those that are asked for; the others are undefined.
struct Gradients {
  at::Tensor dx, dweight, dbias;
};

/// @param inputs Views of what the forward saved. @param weight, bias The places of these arguments; none: -1.
inline Gradients gradients_of(AutogradContext& context, const at::Tensor& dy, const bitlinear::BackwardInputs& inputs,
                              int weight, int bias) {
  const Matrix rows = rows_of(dy, "dy");
  const std::int64_t out_features = rows.view.cols;
  const std::vector<std::int64_t> x_shape = context.saved_data["x_shape"].toIntVector();
  Gradients gradients;
  if (context.needs_input_grad(0)) gradients.dx = empty(x_shape, context.saved_data["x_dtype"].toScalarType());
  if (weight >= 0 && context.needs_input_grad(static_cast<std::size_t>(weight))) {
    gradients.dweight = empty({out_features, x_shape.back()}, context.saved_data["weight_dtype"].toScalarType());
  }
  if (context.saved_data.count("bias_dtype") > 0 && context.needs_input_grad(static_cast<std::size_t>(bias))) {
    gradients.dbias = empty({out_features}, at::kFloat);
  }
  bitlinear::backward(rows.view, inputs, kept_config(context),
                      {output_rows(gradients.dx), output_rows(gradients.dweight),
                       gradients.dbias.defined() ? output_floats(gradients.dbias).data() : nullptr},
                      torch_executor(), multiply);
  if (gradients.dbias.defined()) gradients.dbias = gradients.dbias.to(context.saved_data["bias_dtype"].toScalarType());
  return gradients;
}

/// Inference with gradients for x and bias.
struct Inference : ::torch::autograd::Function<Inference> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& qweight_scale,
                            const at::Tensor& qweight, const OptionalTensor& bias, const BitQuantConfig& config) {
    const Matrix rows = rows_of(x, "x");
    const Matrix weights = matrix(qweight, "qweight");
    const Scale scale = weight_scale_of(qweight_scale, x, weights.view.rows, config);
    const Vector b = vector(bias, "bias");
    at::Tensor y = empty_output(x, weights.view.rows);
    bitlinear::forward(rows.view, scale.values, weights.view, b.view, config, output_rows(y), options());
    context->save_for_backward({qweight_scale, qweight});
    keep(*context, x, bias, config);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative();
    const variable_list saved = context->get_saved_variables();
    const Scale scale = scale_of(saved[0], "qweight_scale", weight_scale_dtype(kept_config(*context)));
    const Matrix qweight = matrix(saved[1], "qweight");
    const Gradients found = gradients_of(*context, gradients[0], {{}, {}, qweight.view, scale.values}, -1, 3);
    return {found.dx, {}, {}, found.dbias, {}};
  }
};

/// The training forward; keeps codes and packed weights for backward, not float copies.
struct Training : ::torch::autograd::Function<Training> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, const BitQuantConfig& config) {
    const Matrix rows = rows_of(x, "x");
    const Vector b = vector(bias, "bias");
    const Prepared weights = prepare(weight, config, Layout::automatic, bitlinear::NonFinite::keep);
    at::Tensor y = empty_output(x, weights.qweight.size(0));
    at::Tensor qx = x, x_scale = empty({0}, at::kFloat);
    ConstMatrixView codes = rows.view;
    if (is_int8(config)) {
      const bool per_tensor = config.activation_granularity == Granularity::per_tensor;
      const bool per_group = config.activation_granularity == Granularity::per_group;
      const std::int64_t of_row = per_group ? weight_groups(rows.view.cols, config) : 1;
      x_scale = per_tensor ? empty({}, at::kFloat) : empty(replace_last(x, of_row), at::kFloat);
      qx = empty(x.sizes(), at::kChar);
      compute_x_scale(rows.view, config, output_floats(x_scale), torch_executor());
      quantize_x(rows.view, output_floats(x_scale), config, output_rows(qx), torch_executor());
      codes = output_rows(qx);
    }
    bitlinear::forward_quantized(codes, output_floats(x_scale), output_vector(weights.scale),
                                 output_rows(weights.qweight), b.view, config, output_rows(y), options());
    context->save_for_backward({qx, x_scale, weights.scale, weights.qweight});
    keep(*context, x, bias, config);
    context->saved_data["weight_dtype"] = weight.scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative();
    const variable_list saved = context->get_saved_variables();
    const Matrix qx = rows_of(saved[0], "x"), qweight = matrix(saved[3], "qweight");
    const Scale x_scale = scale_of(saved[1], "x_scale");
    const Scale scale = scale_of(saved[2], "qweight_scale", weight_scale_dtype(kept_config(*context)));
    const Gradients found =
        gradients_of(*context, gradients[0], {qx.view, x_scale.values.floats(), qweight.view, scale.values}, 1, 2);
    return {found.dx, found.dweight, found.dbias, {}};
  }
};

}  // namespace detail

/// Weights ready for inference, as bitlinear::PreparedWeights.
struct PreparedWeights {
  at::Tensor scale;  ///< float32, () per tensor, (out_features,) per channel; float16 (out_features, groups) per group.
  at::Tensor qweight;  ///< uint8 (out_features, packed_shape().row_bytes()): the bytes that Python reads and writes.
};

/// Scale, ternary codes and packing in one go. Carries no gradient.
/// @param weight (out_features, in_features), float32, bfloat16 or float16; finite.
/// @throws QuantizationError
inline PreparedWeights prepare_weights(const at::Tensor& weight, const BitQuantConfig& config,
                                       Layout layout = Layout::automatic) {
  auto [scale, qweight] = detail::prepare(weight, config, layout, bitlinear::NonFinite::reject);
  return {std::move(scale), std::move(qweight)};
}

/// Inference. x and bias get their gradients.
/// @param x (*, in_features), float32, bfloat16 or float16; also of rank 1, also without rows.
/// @param qweight_scale float32; one element per tensor, (out_features,) or (out_features, 1) per channel; float16
///     (out_features, groups) per group.
/// @param qweight As prepare_weights returns it, or int8 codes (out_features, in_features), which are packed on every
///     call (slow).
/// @param bias (out_features,), floating; undefined: none.
/// @return (*, out_features).
/// @throws QuantizationError, KernelNotFoundError
inline at::Tensor forward(const at::Tensor& x, const at::Tensor& qweight_scale, const at::Tensor& qweight,
                          const at::Tensor& bias, const BitQuantConfig& config) {
  detail::check_readable(x, "x");  // autograd's dispatch takes no undefined tensors
  detail::check_readable(qweight_scale, "qweight_scale");
  detail::check_readable(qweight, "qweight");
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
  detail::check_readable(x, "x");
  detail::check_readable(weight, "weight");
  return detail::Training::apply(x, weight, detail::optional(bias), config);
}

/// A torch::nn::Linear with ternary weights. Trainable until deploy(): it then quantizes `weight` in every forward, in
/// evaluation mode too. Deployed it holds packed weights only, computes the same in both modes, and x and bias still
/// get gradients.
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
  /// @throws StateError if the layer is deployed already.
  /// @throws QuantizationError if the weight is not finite.
  void deploy() {
    if (is_deployed()) throw StateError("deploy: the layer is deployed already");
    auto [scale, packed] = prepare_weights(weight, config);
    qweight_scale = register_buffer("qweight_scale", std::move(scale));
    qweight = register_buffer("qweight", std::move(packed));
    parameters_.erase("weight");
    weight.reset();
    train(false);
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
  at::Tensor qweight_scale;  ///< As PreparedWeights::scale, whatever the layer is cast to; undefined until deployed.
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
