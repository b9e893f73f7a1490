#include "tensors.h"

#include <algorithm>
#include <string>

#include "bitcore/base/checks.h"
#include "bitcore/ops/packing.h"

namespace bitcore::torch_ops {
namespace {

// As torch prints it in Python.
std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// torch hands None over as an undefined tensor.
ScalarType dtype_of(const Tensor& tensor, const char* name) {
  if (!tensor.defined()) fail(name, " is None, expected a tensor");
  return tensor.scalar_type();
}

DType floating_dtype(const Tensor& tensor, const char* name) {
  switch (const ScalarType dtype = dtype_of(tensor, name)) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      fail(name, " has dtype ", to_string(dtype), ", expected float32, bfloat16 or float16");
  }
}

DType code_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = dtype_of(tensor, name);
  if (dtype == ScalarType::Byte) {
    fail(name, " is packed (uint8), expected int8 codes; unpack_weights returns them");
  }
  if (dtype != ScalarType::Char) fail(name, " has dtype ", to_string(dtype), ", expected int8");
  return DType::int8;
}

DType packed_dtype(const Tensor& tensor, bool allow_codes) {
  const ScalarType dtype = dtype_of(tensor, "qweight");
  if (dtype == ScalarType::Byte) return DType::uint8;
  if (dtype == ScalarType::Char && allow_codes) return DType::int8;
  fail("qweight has dtype ", to_string(dtype), ", expected uint8 (packed)", allow_codes ? " or int8 (codes)" : "");
}

// Through the dispatcher only where there is something to copy.
Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Before anything of that size is copied.
void check_width(std::int64_t width, const char* name, const char* what) {
  if (width > kMaxInFeatures) fail(name, " has ", width, what, ", at most ", kMaxInFeatures, " are supported");
}

// Rank 2 with adjacent elements in each row, and rows that do not overlap (as those of an expanded tensor do).
Matrix matrix(const Tensor& tensor, DType dtype) {
  const bool adjacent = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool apart = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
  Tensor owner = adjacent && apart ? tensor : torch::stable::contiguous(tensor);
  const ConstMatrixView view(owner.const_data_ptr(), dtype, owner.size(0), owner.size(1),
                             owner.size(0) > 1 ? owner.stride(0) : owner.size(1));
  return {std::move(owner), view};
}

Matrix rows_of(const Tensor& tensor, DType dtype, const char* name, bool of_features = true) {
  const std::int64_t rank = tensor.dim();
  if (rank == 0) fail(name, " has 0 dimensions, expected at least 1");
  if (of_features) check_width(tensor.size(rank - 1), name, " features");
  if (rank == 2) return matrix(tensor, dtype);
  std::int64_t rows = 1;
  for (std::int64_t d = 0; d + 1 < rank; ++d) rows *= tensor.size(d);
  const Shape flat = {rows, tensor.size(rank - 1)};
  return matrix(torch::stable::reshape(tensor, flat), dtype);
}

Scale scale_of(const Tensor& scale, const char* name, DType expected = DType::float32) {
  const ScalarType dtype = dtype_of(scale, name);
  if (dtype != (expected == DType::float16 ? ScalarType::Half : ScalarType::Float)) {
    fail(name, " has dtype ", to_string(dtype), ", expected ", bitcore::to_string(expected));
  }
  Tensor owner = made_contiguous(scale);
  const ConstVectorView values(owner.const_data_ptr(), expected, owner.numel());
  return {std::move(owner), values};
}

void check_one_element(const Tensor& scale, const char* name, const char* what) {
  if (scale.numel() == 1) return;
  fail(name, " has shape ", to_string(shape_of(scale)), ", expected one element for per_tensor ", what);
}

// A weight of either kind: rank 2, no side empty.
void check_weight_shape(const Tensor& weight, const char* name) {
  const Shape shape = shape_of(weight);
  if (shape.size() != 2) fail(name, " has ", shape.size(), " dimensions, expected 2");
  if (shape[0] < 1) fail(name, " has 0 out_features, expected at least 1");
  if (shape[1] < 1) fail(name, " has 0 in_features, expected at least 1");
  check_width(shape[1], name, " in_features");
}

}  // namespace

BitQuantConfig make_config(bool weight_per_channel, bool int8_activations, bool x_per_channel, std::int64_t group_size,
                           bool x_per_group) {
  BitQuantConfig config = {weight_per_channel ? Granularity::per_channel : Granularity::per_tensor,
                           int8_activations ? ActivationDtype::int8 : ActivationDtype::float32,
                           x_per_channel ? Granularity::per_channel : Granularity::per_tensor};
  if (group_size != 0) {
    config.weight_granularity = Granularity::per_group;
    config.group_size = group_size;
  }
  if (x_per_group) config.activation_granularity = Granularity::per_group;
  check_config(config);
  return config;
}

BitQuantConfig weight_config(bool per_channel, std::int64_t group_size) {
  return make_config(per_channel, true, true, group_size);
}

BitQuantConfig x_config(bool per_channel, std::int64_t group_size) {
  return make_config(false, true, per_channel, group_size, group_size != 0);
}

Shape replace_last(const Tensor& x, std::int64_t last) {
  Shape shape = shape_of(x);
  shape.back() = last;
  return shape;
}

Matrix floating_rows(const Tensor& x, const char* name) { return rows_of(x, floating_dtype(x, name), name); }

Matrix gradient_rows(const Tensor& dy) { return rows_of(dy, floating_dtype(dy, "dy"), "dy", /*of_features=*/false); }

Matrix code_rows(const Tensor& qx, const char* name) { return rows_of(qx, code_dtype(qx, name), name); }

Matrix floating_matrix(const Tensor& weight, const char* name) {
  const DType dtype = floating_dtype(weight, name);
  check_weight_shape(weight, name);
  return matrix(weight, dtype);
}

Matrix code_matrix(const Tensor& qweight, const char* name) {
  const DType dtype = code_dtype(qweight, name);
  check_weight_shape(qweight, name);
  return matrix(qweight, dtype);
}

Matrix packed_matrix(const Tensor& qweight, bool allow_codes) {
  const DType dtype = packed_dtype(qweight, allow_codes);
  check_weight_shape(qweight, "qweight");
  return matrix(made_contiguous(qweight), dtype);
}

Matrix any_weight(const Tensor& qweight, std::int64_t in_features) {
  const ScalarType dtype = dtype_of(qweight, "qweight");
  const bool packed = dtype == ScalarType::Byte;
  Matrix weight = packed || dtype == ScalarType::Char ? packed_matrix(qweight, /*allow_codes=*/true)
                                                      : floating_matrix(qweight, "qweight");
  if (packed) check_trailer(weight.view, in_features);
  if (!packed) check_shape(weight.view.rows, weight.view.cols, weight.view.rows, in_features, "qweight");
  return weight;
}

Vector floating_vector(const std::optional<Tensor>& tensor, std::int64_t size, const char* name) {
  if (!tensor.has_value()) return {};
  const DType dtype = floating_dtype(*tensor, name);
  const Shape shape = shape_of(*tensor);
  if (shape != Shape{size}) fail(name, " has shape ", to_string(shape), ", expected ", to_string(Shape{size}));
  Tensor owner = made_contiguous(*tensor);
  const ConstVectorView view(owner.const_data_ptr(), dtype, owner.size(0));
  return {std::move(owner), view};
}

Scale weight_scale(const Tensor& scale, const char* name, std::int64_t rows, std::int64_t cols,
                   const BitQuantConfig& config) {
  Scale checked = scale_of(scale, name, weight_scale_dtype(config));
  if (config.weight_granularity == Granularity::per_tensor) {
    check_one_element(scale, name, "weights");
    return checked;
  }
  const Shape shape = shape_of(scale);
  if (config.weight_granularity == Granularity::per_group) {
    const Shape expected = {rows, weight_groups(cols, config)};
    if (shape != expected) {
      fail(name, " has shape ", to_string(shape), ", expected ", to_string(expected), " for weights of ", cols,
           " in_features in groups of ", config.group_size);
    }
  } else if (shape != Shape{rows} && shape != Shape{rows, 1}) {
    fail(name, " has shape ", to_string(shape), ", expected ", to_string(Shape{rows}), " for per_channel weights");
  }
  return checked;
}

Scale x_scale(const Tensor& scale, const Tensor& x, const BitQuantConfig& config) {
  Scale checked = scale_of(scale, "scale");
  if (config.activation_granularity == Granularity::per_tensor) {
    check_one_element(scale, "scale", "activations");
    return checked;
  }
  const bool groups = config.activation_granularity == Granularity::per_group;
  const Shape shape = shape_of(scale);
  const Shape expected = replace_last(x, groups ? weight_groups(x.size(-1), config) : 1);
  if (shape != expected) {
    fail("scale has shape ", to_string(shape), ", expected ", to_string(expected), " for ",
         bitcore::to_string(config.activation_granularity), " activations",
         groups ? " in groups of " + std::to_string(config.group_size) : "");
  }
  return checked;
}

Tensor empty_weight_scale(std::int64_t rows, std::int64_t cols, const BitQuantConfig& config) {
  switch (config.weight_granularity) {
    case Granularity::per_tensor:
      return empty({}, ScalarType::Float);
    case Granularity::per_channel:
      return empty({rows}, ScalarType::Float);
    case Granularity::per_group:
      break;
  }
  return empty({rows, weight_groups(cols, config)}, ScalarType::Half);
}

Tensor empty_x_scale(const Tensor& x, const BitQuantConfig& config) {
  if (config.activation_granularity == Granularity::per_tensor) return empty({}, ScalarType::Float);
  const bool groups = config.activation_granularity == Granularity::per_group;
  return empty(replace_last(x, groups ? weight_groups(x.size(-1), config) : 1), ScalarType::Float);
}

void check_floating_dtype(ScalarType dtype, const char* name) {
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail(name, " must be float32, bfloat16 or float16");
  }
}

// The C function behind torch::stable::empty, without its way through the dispatcher: microseconds in a small layer.
Tensor empty(const Shape& shape, ScalarType dtype) {
  Shape strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; stride *= std::max<std::int64_t>(1, shape[d])) strides[d] = stride;
  const auto dtype_code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype_code, aoti_torch_device_type_cpu(),
                                                         /*device_index=*/0, &handle));
  return Tensor(handle);
}

Tensor borrowed(ConstMatrixView view) {
  const Shape shape = {view.rows, view.cols}, strides = {view.row_stride, 1};
  const ScalarType dtype = view.dtype == DType::bfloat16  ? ScalarType::BFloat16
                           : view.dtype == DType::float16 ? ScalarType::Half
                           : view.dtype == DType::float32 ? ScalarType::Float
                           : view.dtype == DType::int8    ? ScalarType::Char
                                                          : ScalarType::Byte;
  return torch::stable::from_blob(const_cast<void*>(view.data), shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

MatrixView output_rows(const Tensor& tensor) {
  DType dtype = DType::float32;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      dtype = DType::bfloat16;
      break;
    case ScalarType::Half:
      dtype = DType::float16;
      break;
    case ScalarType::Char:
      dtype = DType::int8;
      break;
    case ScalarType::Byte:
      dtype = DType::uint8;
      break;
    default:
      break;
  }
  const std::int64_t rank = tensor.dim();
  const std::int64_t cols = tensor.size(rank - 1);
  return {tensor.mutable_data_ptr(), dtype, cols > 0 ? tensor.numel() / cols : 0, cols, cols};
}

std::span<float> output_floats(const Tensor& tensor) {
  return {static_cast<float*>(tensor.mutable_data_ptr()), static_cast<std::size_t>(tensor.numel())};
}

VectorView output_vector(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.scalar_type() == ScalarType::Half ? DType::float16 : DType::float32,
          tensor.numel()};
}

}  // namespace bitcore::torch_ops
