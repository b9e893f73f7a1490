// The layer's straight-through backward: dX = (dY * s_w) @ q_w, dW = (dY * s_x)^T @ q_x, db = sum over rows of dY.
//
// Small layers by the engine's loops, in float32. Others by torch's matmul, which multiplies the integer codes as
// floats: in float32, but in bfloat16 where dY is bfloat16 (float32 activations: dW always in float32). They go through
// blocks of in_features, so that the codes of a block, and products that are still to be rounded to another dtype, stay
// in the cache: as whole matrices they would be as large as a float weight, in new memory at every call.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "bitcore/base/checks.h"
#include "bitcore/base/parallel.h"
#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/quantize/row_functions.h"
#include "bitcore/torch_executor.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

// Up to so many multiply-adds the engine's loops take less time than two calls of torch's matmul.
constexpr std::int64_t kSmallWork = std::int64_t{1} << 17;
// Their sums are plain sums over the rows.
constexpr std::int64_t kSmallRows = 256;
// Of a block's codes as floats. Those of the weight are many: a block that stays in the cache is read fastest. Those of
// x are fewer, and dW is written fastest in whole rows.
constexpr std::int64_t kWeightBlockBytes = std::int64_t{4} << 20;
constexpr std::int64_t kXBlockBytes = std::int64_t{16} << 20;
// Of a product that is still to be rounded to another dtype.
constexpr std::int64_t kProductBytes = std::int64_t{4} << 20;
constexpr std::int64_t kProductRows = 64;  // A multiple of the rows that a matmul computes at once.
// Columns of a block are a multiple of both layouts' steps, 16 and 20.
constexpr std::int64_t kBlockColumns = 80;
// Fewer, and torch's matmul would lose time: rows of left are read once for every block.
constexpr std::int64_t kLeastColumns = 320;

// All arguments, checked.
struct Problem {
  Matrix dy;                                // (rows, out_features)
  std::optional<Matrix> x;                  // (rows, in_features): int8 codes or floating
  std::span<const float> x_scale;           // empty where x is floating
  std::optional<Matrix> weight;             // floating: its codes are computed anew
  std::vector<std::uint8_t> packed_weight;  // of it, where the engine's loops are used
  std::optional<Matrix> qweight;            // packed
  std::span<const float> qweight_scale;
  std::int64_t in_features = 0;
  BitQuantConfig config;
  std::optional<Tensor> x_scale_owner, qweight_scale_owner;

  std::int64_t rows() const { return dy.view.rows; }
  std::int64_t out_features() const { return dy.view.cols; }
  bool has_codes() const { return config.activation_dtype == ActivationDtype::int8; }
  ConstMatrixView packed() const {
    if (qweight.has_value()) return qweight->view;
    if (packed_weight.empty()) return {};
    const std::int64_t rows = weight->view.rows;
    return {packed_weight.data(), rows, static_cast<std::int64_t>(packed_weight.size()) / rows};
  }
  bitlinear::BackwardInputs inputs() const {
    return {x.has_value() ? x->view : ConstMatrixView(), x_scale, packed(), qweight_scale};
  }
};

void fill(const MatrixView& m, const std::function<void(std::int64_t row)>& write) {
  parallel_ranges(torch_executor(), m.rows, std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, m.cols)),
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t row = begin; row < end; ++row) write(row);
                  });
}

// Columns [first, first + cols) of a matrix.
template <class View>
View columns(View m, std::int64_t first, std::int64_t cols) {
  View part = m;
  part.data = m.row(0) + first * static_cast<std::int64_t>(size_of(m.dtype));
  part.cols = cols;
  return part;
}

// out = in, in out's dtype; in: int8 codes or floating.
void copy_as(ConstMatrixView in, MatrixView out) {
  const float one = 1.0f;
  fill(out, [&](std::int64_t row) {
    if (in.dtype == DType::int8) {
      row_functions().codes_as_floats(reinterpret_cast<const std::int8_t*>(in.row(row)), in.cols, out.dtype,
                                      out.row(row));
    } else {
      row_functions().scaled(in.row(row), in.dtype, in.cols, &one, 0, out.dtype, out.row(row));
    }
  });
}

// dY with a factor for each column, each row, or everything.
Tensor scaled_dy(const Problem& problem, std::span<const float> scale, bool by_column, ScalarType dtype) {
  Tensor scaled = empty({problem.rows(), problem.out_features()}, dtype);
  const MatrixView out = output_rows(scaled);
  const ConstMatrixView dy = problem.dy.view;
  const bool one = scale.size() == 1;
  fill(out, [&](std::int64_t row) {
    const float* factors = scale.data() + (one || by_column ? 0 : row);
    row_functions().scaled(dy.row(row), dy.dtype, dy.cols, factors, one || !by_column ? 0 : 1, out.dtype, out.row(row));
  });
  return scaled;
}

Tensor narrowed(Tensor& tensor, std::int64_t dimension, std::int64_t first, std::int64_t size) {
  return size == tensor.size(dimension) ? tensor : torch::stable::narrow(tensor, dimension, first, size);
}

// out = left @ right. The out form: autocast leaves it alone.
void multiply(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // out once more, owned by the receiver
}

// Columns [first, first + codes.cols) of the codes of a floating weight. scale: of at least 1e-5, or NaN, where every
// code is 0; see bitlinear::prepare_weights.
void quantize_columns(ConstMatrixView weight, std::span<const float> scale, std::int64_t first, MatrixView codes) {
  constexpr std::int64_t kPiece = 512;  // whose copies stay in the L1 cache
  const float one = 1.0f;
  const ConstMatrixView part = columns(weight, first, codes.cols);
  const auto element = static_cast<std::int64_t>(size_of(weight.dtype));
  const auto out_element = static_cast<std::int64_t>(size_of(codes.dtype));
  fill(codes, [&](std::int64_t row) {
    const float half = 0.5f * scale[scale.size() == 1 ? 0 : static_cast<std::size_t>(row)];
    for (std::int64_t k = 0; k < codes.cols; k += kPiece) {
      const std::int64_t count = std::min(kPiece, codes.cols - k);
      float wide[kPiece];
      std::uint8_t piece[kPiece];
      const float* values = reinterpret_cast<const float*>(part.row(row) + k * element);
      if (weight.dtype != DType::float32) {
        row_functions().scaled(part.row(row) + k * element, weight.dtype, count, &one, 0, DType::float32, wide);
        values = wide;
      }
      row_functions().ternary_codes(values, count, half, piece);
      row_functions().weights_of(piece, count, codes.dtype, codes.row(row) + k * out_element);
    }
  });
}

// A gradient, left @ codes, that is computed in blocks of columns. Where it has another dtype than left it goes through
// a small product, some rows at a time, and is rounded from there.
class BlockedProduct {
 public:
  BlockedProduct(Tensor left, Tensor gradient, std::int64_t block_bytes)
      : left_(std::move(left)),
        gradient_(std::move(gradient)),
        width_(std::min(gradient_.size(1), fitting(block_bytes, left_.size(1)) / kBlockColumns * kBlockColumns)) {
    width_ = std::max(width_, std::min(gradient_.size(1), kLeastColumns));
    codes_.emplace(empty({left_.size(1), width_}, left_.scalar_type()));
    if (gradient_.scalar_type() != left_.scalar_type()) {
      const std::int64_t rows = std::max(kProductRows, fitting(kProductBytes, width_) / kProductRows * kProductRows);
      product_.emplace(empty({std::min(left_.size(0), rows), width_}, left_.scalar_type()));
    }
  }

  /// write(first, view) puts codes, from column `first` on, into a view of left's dtype.
  template <class Write>
  void run(const Write& write) {
    for (std::int64_t first = 0; first < gradient_.size(1); first += width_) {
      const std::int64_t cols = std::min(width_, gradient_.size(1) - first);
      write(first, columns(output_rows(*codes_), 0, cols));
      const Tensor codes = narrowed(*codes_, 1, 0, cols);
      if (product_.has_value()) {
        multiply_by_rows(codes, first, cols);
      } else {
        multiply(left_, codes, narrowed(gradient_, 1, first, cols));
      }
    }
  }

 private:
  // Rows of so many elements that fit into so many bytes.
  std::int64_t fitting(std::int64_t bytes, std::int64_t elements) const {
    const std::int64_t element = left_.scalar_type() == ScalarType::Float ? 4 : 2;
    return bytes / (std::max<std::int64_t>(1, elements) * element);
  }

  void multiply_by_rows(const Tensor& codes, std::int64_t first, std::int64_t cols) {
    const MatrixView out = columns(output_rows(gradient_), first, cols);
    for (std::int64_t row = 0; row < out.rows; row += product_->size(0)) {
      const std::int64_t rows = std::min(product_->size(0), out.rows - row);
      Tensor part = narrowed(*product_, 0, 0, rows);
      multiply(narrowed(left_, 0, row, rows), codes, narrowed(part, 1, 0, cols));
      copy_as(columns(ConstMatrixView(output_rows(part)), 0, cols),
              {out.row(row), out.dtype, rows, cols, out.row_stride});
    }
  }

  Tensor left_;
  Tensor gradient_;
  std::int64_t width_;             // Columns of a block.
  std::optional<Tensor> codes_;    // (left's columns, width)
  std::optional<Tensor> product_;  // (some rows, width)
};

void dx_by_matmul(const Problem& problem, ScalarType operand, Tensor& dx) {
  BlockedProduct product(scaled_dy(problem, problem.qweight_scale, true, operand),
                         torch::stable::view(dx, std::array{problem.rows(), problem.in_features}), kWeightBlockBytes);
  product.run([&](std::int64_t first, MatrixView codes) {
    if (problem.weight.has_value()) {
      quantize_columns(problem.weight->view, problem.qweight_scale, first, codes);
    } else {
      unpack_columns(problem.qweight->view, problem.in_features, first, codes, torch_executor());
    }
  });
}

void dweight_by_matmul(const Problem& problem, ScalarType operand, Tensor& dweight) {
  const float one = 1.0f;
  const bool has_codes = problem.has_codes();
  Tensor scaled = scaled_dy(problem, has_codes ? problem.x_scale : std::span(&one, 1), false,
                            has_codes ? operand : ScalarType::Float);
  BlockedProduct product(torch::stable::transpose(scaled, 0, 1), dweight, kXBlockBytes);
  product.run(
      [&](std::int64_t first, MatrixView codes) { copy_as(columns(problem.x->view, first, codes.cols), codes); });
}

Matrix packed_form(const Tensor& qweight) {
  Matrix given = packed_matrix(qweight, /*allow_codes=*/true);
  if (given.view.dtype == DType::uint8) return given;
  const PackedShape shape = packed_shape(given.view.rows, given.view.cols);
  Tensor packed = empty({shape.out_features, shape.row_bytes()}, ScalarType::Byte);
  pack_weights(given.view, output_rows(packed));
  const ConstMatrixView view = output_rows(packed);
  return {std::move(packed), view};
}

bool is_floating(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Packs a floating weight, a small one.
void pack_weight(Problem& problem) {
  const ConstMatrixView weight = problem.weight->view;
  std::vector<std::int8_t> codes(static_cast<std::size_t>(weight.rows * weight.cols));
  quantize_columns(weight, problem.qweight_scale, 0, {codes.data(), weight.rows, weight.cols});
  problem.packed_weight = bitcore::pack_weights({codes.data(), weight.rows, weight.cols});
}

Problem checked(const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& x_scale,
                const Tensor& qweight, const Tensor& qweight_scale, std::int64_t in_features, bool weight_per_channel) {
  Problem problem;
  problem.dy = gradient_rows(dy);
  problem.in_features = in_features;
  if (is_floating(qweight)) {
    problem.weight = floating_matrix(qweight, "qweight");
    const ConstMatrixView weight = problem.weight->view;
    check_shape(weight.rows, weight.cols, weight.rows, in_features, "qweight");
  } else {
    problem.qweight = packed_form(qweight);
    check_trailer(problem.qweight->view, in_features);
  }
  const std::int64_t out_features = qweight.size(0);
  check_shape(problem.rows(), problem.out_features(), problem.rows(), out_features, "dy");
  Scale w_scale = weight_scale(qweight_scale, "qweight_scale", out_features, weight_per_channel);
  problem.qweight_scale = w_scale.values;
  problem.qweight_scale_owner = std::move(w_scale.owner);
  problem.config = make_config(weight_per_channel, false, false);
  if (!x.has_value()) return problem;
  const bool int8 = x->scalar_type() == ScalarType::Char;
  problem.x = int8 ? code_rows(*x, "x") : floating_rows(*x, "x");
  check_shape(problem.x->view.rows, problem.x->view.cols, problem.rows(), in_features, "x");
  if (int8) {
    if (!x_scale.has_value()) throw QuantizationError("x_scale is None, int8 codes need it");
    Scale scale = bitcore::torch_ops::x_scale(*x_scale, *x, x_scale->dim() > 0);
    problem.x_scale = scale.values;
    problem.x_scale_owner = std::move(scale.owner);
    problem.config = make_config(weight_per_channel, true, x_scale->dim() > 0);
  }
  return problem;
}

std::optional<Tensor> gradient(const Shape& shape, std::optional<ScalarType> dtype, const char* name) {
  if (!dtype.has_value()) return std::nullopt;
  check_floating_dtype(*dtype, name);
  return empty(shape, *dtype);
}

Tensor or_nothing(std::optional<Tensor>& gradient) {
  return gradient.has_value() ? std::move(*gradient) : empty({0}, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bitlinear_backward(const Tensor& dy, std::optional<Tensor> x,
                                                      std::optional<Tensor> x_scale, const Tensor& qweight,
                                                      const Tensor& qweight_scale, std::int64_t in_features,
                                                      bool weight_per_channel, std::optional<ScalarType> dx_dtype,
                                                      std::optional<ScalarType> dweight_dtype,
                                                      std::optional<ScalarType> dbias_dtype) {
  Problem problem = checked(dy, x, x_scale, qweight, qweight_scale, in_features, weight_per_channel);
  const Shape weight_shape = {problem.out_features(), in_features};
  std::optional<Tensor> dx = gradient(replace_last(dy, in_features), dx_dtype, "dx_dtype");
  std::optional<Tensor> dweight = gradient(weight_shape, dweight_dtype, "dweight_dtype");
  std::optional<Tensor> dbias = gradient({problem.out_features()}, dbias_dtype, "dbias_dtype");
  if (dweight.has_value() && !problem.x.has_value()) throw QuantizationError("x is None, dweight needs it");

  const bool small = problem.rows() <= kSmallRows && problem.rows() * weight_shape[0] * weight_shape[1] <= kSmallWork;
  if (small && dx && problem.weight.has_value()) pack_weight(problem);
  const bool narrow_bias = dbias && *dbias_dtype != ScalarType::Float;
  std::vector<float> wide_bias(narrow_bias ? static_cast<std::size_t>(weight_shape[0]) : 0);
  bitcore::bitlinear::backward(
      problem.dy.view, problem.inputs(), problem.config,
      {small && dx ? output_rows(*dx) : MatrixView(), small && dweight ? output_rows(*dweight) : MatrixView(),
       narrow_bias ? wide_bias.data()
       : dbias     ? output_floats(*dbias).data()
                   : nullptr},
      torch_executor());
  if (narrow_bias) convert({wide_bias.data(), 1, weight_shape[0]}, output_rows(*dbias));
  if (!small) {
    const ScalarType operand = problem.dy.view.dtype == DType::bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
    if (dx) dx_by_matmul(problem, operand, *dx);
    if (dweight) dweight_by_matmul(problem, operand, *dweight);
  }
  return {or_nothing(dx), or_nothing(dweight), or_nothing(dbias)};
}

}  // namespace bitcore::torch_ops
