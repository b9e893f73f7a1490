// The straight-through backward: dX = (dY * s_w) @ q_w, dW = (dY * s_x)^T @ q_x, db = sum over rows of dY. Where
// weights have a scale per group, no scale can leave the sum over their columns: dX = dY @ (q_w * s_w), dW = dY^T @
// (q_x * s_x), each product rounded once. The one of the engine and of both bindings.
//
// Small layers, and all where no matmul is given, by loops in float32. Others by the caller's matmul, which multiplies
// the integer codes as floats: in float32, but in bfloat16 if dY is bfloat16 (float32 activations: dW always in
// float32). They go through blocks of in_features, so that the codes of a block, and products that are still to be
// rounded to another dtype, stay in the cache: as whole matrices they would be as large as a float weight, in new
// memory at every call.
#include <algorithm>
#include <optional>
#include <vector>

#include "bitcore/base/aligned_array.h"
#include "bitcore/base/checks.h"
#include "bitcore/base/parallel.h"
#include "bitcore/base/scales.h"
#include "bitcore/linear/linear_internal.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/packing/code_rows.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"
#include "bitcore/quantize/row_functions.h"

namespace bitcore::bitlinear {
namespace {

// Up to so many multiply-adds the loops take less time than two calls of torch's matmul.
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
// Fewer, and a matmul would lose time: rows of left are read once for every block.
constexpr std::int64_t kLeastColumns = 320;
// Of a floating weight that are quantized at once: their copies stay in the L1 cache.
constexpr std::int64_t kPiece = 512;

// Multiply-adds below which a thread costs the loops more to start than it saves.
constexpr std::int64_t kThreadWork = std::int64_t{1} << 16;

constexpr float kOne = 1.0f;

// Factors of the elements of a vector: one for each, or one for all.
struct Factors {
  const float* values = &kOne;
  std::int64_t step = 0;  // 0: one for all
};

// dq(x) = q_x * s_x: the codes or x itself, and their scales.
struct QuantizedX {
  ConstMatrixView qx;
  Scales scales;
  bool grouped;  // scales go into the codes, otherwise into dY

  bool has_codes() const { return qx.dtype == DType::int8; }
  Factors dy_factors(std::int64_t row) const {
    if (grouped || !has_codes()) return {};
    return {static_cast<const float*>(scales.values.data) + row * scales.row_step, 0};
  }
};

// dq(W) = q_w * s_w: packed codes, or the floating weight that has them with these scales.
struct TernaryWeight {
  ConstMatrixView weight;
  Scales scales;
  PackedShape shape;
  bool grouped;  // as in QuantizedX

  bool is_packed() const { return weight.dtype == DType::uint8; }
  Factors dy_factors() const {
    if (grouped) return {};
    return {static_cast<const float*>(scales.values.data), scales.row_step};
  }
};

// Calls visit(first, count, scale) for the pieces of columns [begin, begin + cols) of a row that share a scale; first
// counts from begin.
template <class Visit>
void for_each_piece(const Scales& scales, std::int64_t row, std::int64_t begin, std::int64_t cols, const Visit& visit) {
  for (std::int64_t k = begin; k < begin + cols;) {
    const std::int64_t group = k / scales.group_size;
    const std::int64_t end = std::min(begin + cols, (group + 1) * scales.group_size);
    visit(k - begin, end - k, scales.at(row, group));
    k = end;
  }
}

// The codes in `values`, which are columns [begin, begin + cols) of a row, times their scales, each rounded once.
void scale_codes(const Scales& scales, std::int64_t row, std::int64_t begin, std::int64_t cols, DType dtype,
                 std::byte* values) {
  for_each_piece(scales, row, begin, cols, [&](std::int64_t first, std::int64_t count, float scale) {
    std::byte* piece = values + static_cast<std::size_t>(first) * size_of(dtype);
    row_functions().scaled(piece, dtype, count, &scale, 0, dtype, piece);
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

template <class View>
View rows(View m, std::int64_t first, std::int64_t count) {
  View part = m;
  part.data = m.row(first);
  part.rows = count;
  return part;
}

float* float_row(MatrixView m, std::int64_t row) { return reinterpret_cast<float*>(m.row(row)); }

// out = the codes of some weights of one row as numbers. scale: of at least 1e-5, or NaN, where every code is 0; see
// prepare_weights.
void quantize_weights(const std::byte* weights, DType dtype, std::int64_t count, float scale, DType out_dtype,
                      std::byte* out) {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  const auto out_element = static_cast<std::int64_t>(size_of(out_dtype));
  for (std::int64_t k = 0; k < count; k += kPiece) {
    const std::int64_t size = std::min(kPiece, count - k);
    float wide[kPiece];
    std::uint8_t codes[kPiece];
    const float* values = reinterpret_cast<const float*>(weights + k * element);
    if (dtype != DType::float32) {
      row_functions().scaled(weights + k * element, dtype, size, &kOne, 0, DType::float32, wide);
      values = wide;
    }
    row_functions().ternary_codes(values, size, 0.5f * scale, codes);
    code_rows().weights_of(codes, size, out_dtype, out + k * out_element);
  }
}

// ---- by loops ------------------------------------------------------------------------------------------------------

// out[k] += factor * in[k]
void add_scaled(const float* in, float factor, std::int64_t count, float* out) {
  for (std::int64_t k = 0; k < count; ++k) out[k] += factor * in[k];
}

// Rows of a gradient that a thread computes at least, each of so many multiply-adds.
std::int64_t least_rows(std::int64_t macs_per_row) {
  return std::max<std::int64_t>(1, kThreadWork / std::max<std::int64_t>(1, macs_per_row));
}

// A float32 matrix: of its own, or the view itself where that is float32.
struct FloatMatrix {
  std::vector<float> memory;
  MatrixView view;

  explicit FloatMatrix(MatrixView like) : view(like) {
    if (like.dtype == DType::float32) return;
    memory.resize(static_cast<std::size_t>(like.rows * like.cols));
    view = {memory.data(), like.rows, like.cols};
  }
};

// Columns [first, first + cols) of row n of q_w of a floating weight.
void quantize_row(const TernaryWeight& w, std::int64_t n, std::int64_t first, std::int64_t cols, DType out_dtype,
                  std::byte* out) {
  const std::byte* weights = w.weight.row(n) + static_cast<std::size_t>(first) * size_of(w.weight.dtype);
  for_each_piece(w.scales, n, first, cols, [&](std::int64_t begin, std::int64_t count, float scale) {
    quantize_weights(weights + static_cast<std::size_t>(begin) * size_of(w.weight.dtype), w.weight.dtype, count, scale,
                     out_dtype, out + static_cast<std::size_t>(begin) * size_of(out_dtype));
  });
}

// Row n of q_w as floats, of dq(W) where it is grouped. @param codes Scratch of padded_in_features().
void unpack_row(const TernaryWeight& w, std::int64_t n, std::uint8_t* codes, float* out) {
  const std::int64_t in_features = w.shape.in_features;
  auto* bytes = reinterpret_cast<std::byte*>(out);
  if (w.is_packed()) {
    unpack_code_row(static_cast<const std::uint8_t*>(w.weight.data), w.shape, n, codes);
    code_rows().weights_of(codes, in_features, DType::float32, out);
  } else {
    quantize_row(w, n, 0, in_features, DType::float32, bytes);
  }
  if (w.grouped) scale_codes(w.scales, n, 0, in_features, DType::float32, bytes);
}

void dx_by_loops(ConstMatrixView dy, const TernaryWeight& w, MatrixView dx, Executor& executor) {
  const FloatMatrix sums(dx);
  const Factors factors = w.dy_factors();
  parallel_ranges(executor, dx.rows, least_rows(dy.cols * dx.cols), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(w.shape.padded_in_features()));
    std::vector<float> weights(static_cast<std::size_t>(dx.cols));
    std::vector<float> scaled_dy(static_cast<std::size_t>((end - begin) * dy.cols));
    for (std::int64_t m = begin; m < end; ++m) {
      std::fill_n(float_row(sums.view, m), dx.cols, 0.0f);
      row_functions().scaled(dy.row(m), dy.dtype, dy.cols, factors.values, factors.step, DType::float32,
                             &scaled_dy[static_cast<std::size_t>((m - begin) * dy.cols)]);
    }
    for (std::int64_t n = 0; n < dy.cols; ++n) {
      unpack_row(w, n, codes.data(), weights.data());
      for (std::int64_t m = begin; m < end; ++m) {
        const float factor = scaled_dy[static_cast<std::size_t>((m - begin) * dy.cols + n)];
        add_scaled(weights.data(), factor, dx.cols, float_row(sums.view, m));
      }
    }
    for (std::int64_t m = begin; m < end && dx.dtype != DType::float32; ++m) {
      narrow(float_row(sums.view, m), dx.cols, dx.dtype, dx.row(m));
    }
  });
}

void dweight_by_loops(ConstMatrixView dy, const QuantizedX& x, MatrixView dweight, Executor& executor) {
  const FloatMatrix sums(dweight);
  const std::int64_t least = least_rows(dy.rows * dweight.cols);
  parallel_ranges(executor, dweight.rows, least, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(dweight.cols)), scaled_dy(static_cast<std::size_t>(end - begin));
    for (std::int64_t n = begin; n < end; ++n) std::fill_n(float_row(sums.view, n), dweight.cols, 0.0f);
    const auto first = static_cast<std::size_t>(begin) * size_of(dy.dtype);
    for (std::int64_t m = 0; m < dy.rows; ++m) {
      row_functions().scaled(dy.row(m) + first, dy.dtype, end - begin, x.dy_factors(m).values, 0, DType::float32,
                             scaled_dy.data());
      if (x.has_codes()) {
        row_functions().codes_as_floats(reinterpret_cast<const std::int8_t*>(x.qx.row(m)), dweight.cols, DType::float32,
                                        row.data());
        if (x.grouped) {
          scale_codes(x.scales, m, 0, dweight.cols, DType::float32, reinterpret_cast<std::byte*>(row.data()));
        }
      } else {
        widen(x.qx.row(m), x.qx.dtype, dweight.cols, row.data());
      }
      for (std::int64_t n = begin; n < end; ++n) {
        add_scaled(row.data(), scaled_dy[static_cast<std::size_t>(n - begin)], dweight.cols, float_row(sums.view, n));
      }
    }
    for (std::int64_t n = begin; n < end && dweight.dtype != DType::float32; ++n) {
      narrow(float_row(sums.view, n), dweight.cols, dweight.dtype, dweight.row(n));
    }
  });
}

// In float64: there may be many rows.
void sum_rows(ConstMatrixView dy, float* dbias, Executor& executor) {
  parallel_ranges(executor, dy.cols, 512, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sums(static_cast<std::size_t>(end - begin));
    std::vector<float> row(sums.size());
    for (std::int64_t m = 0; m < dy.rows; ++m) {
      widen(dy.row(m) + static_cast<std::size_t>(begin) * size_of(dy.dtype), dy.dtype, end - begin, row.data());
      for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(row[n]);
    }
    for (std::size_t n = 0; n < sums.size(); ++n)
      dbias[begin + static_cast<std::int64_t>(n)] = static_cast<float>(sums[n]);
  });
}

// ---- by the caller's matmul ----------------------------------------------------------------------------------------

// A contiguous floating matrix of its own, uninitialized.
class Scratch {
 public:
  Scratch(std::int64_t rows, std::int64_t cols, DType dtype)
      : memory_(rows * cols * static_cast<std::int64_t>(size_of(dtype))),
        view_(memory_.data(), dtype, rows, cols, cols) {}
  MatrixView view() { return view_; }

 private:
  AlignedArray<std::byte> memory_;
  MatrixView view_;
};

template <class Write>
void for_each_row(MatrixView m, Executor& executor, const Write& write) {
  parallel_ranges(executor, m.rows, std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, m.cols)),
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t row = begin; row < end; ++row) write(row);
                  });
}

// out = in, in out's dtype; in: int8 codes or floating.
void copy_as(ConstMatrixView in, MatrixView out, Executor& executor) {
  for_each_row(out, executor, [&](std::int64_t row) {
    if (in.dtype == DType::int8) {
      row_functions().codes_as_floats(reinterpret_cast<const std::int8_t*>(in.row(row)), in.cols, out.dtype,
                                      out.row(row));
    } else {
      row_functions().scaled(in.row(row), in.dtype, in.cols, &kOne, 0, out.dtype, out.row(row));
    }
  });
}

// out = codes of columns [first, first + out.cols) as numbers, those of dq(W) where it is grouped.
void unpack_block(const TernaryWeight& w, std::int64_t first, MatrixView out, Executor& executor) {
  if (w.is_packed()) unpack_columns(w.weight, w.shape.in_features, first, out, executor);
  if (w.is_packed() && !w.grouped) return;
  for_each_row(out, executor, [&](std::int64_t row) {
    if (!w.is_packed()) quantize_row(w, row, first, out.cols, out.dtype, out.row(row));
    if (w.grouped) scale_codes(w.scales, row, first, out.cols, out.dtype, out.row(row));
  });
}

// out = columns [first, first + out.cols) of x: its codes, or those of dq(x) where it is grouped.
void copy_block(const QuantizedX& x, std::int64_t first, MatrixView out, Executor& executor) {
  copy_as(columns(x.qx, first, out.cols), out, executor);
  if (!x.grouped || !x.has_codes()) return;
  for_each_row(out, executor,
               [&](std::int64_t row) { scale_codes(x.scales, row, first, out.cols, out.dtype, out.row(row)); });
}

// A gradient, left @ codes or left^T @ codes, that is computed in blocks of columns. If it has another dtype than left
// it goes through a small product, some rows at a time, and is rounded from there.
class BlockedProduct {
 public:
  BlockedProduct(ConstMatrixView left, bool transposed, MatrixView gradient, std::int64_t block_bytes,
                 const Matmul& matmul, Executor& executor)
      : left_(left),
        transposed_(transposed),
        inner_(transposed ? left.rows : left.cols),
        gradient_(gradient),
        matmul_(matmul),
        executor_(executor),
        width_(std::min(gradient.cols, fitting(block_bytes, inner_) / kBlockColumns * kBlockColumns)) {
    width_ = std::max(width_, std::min(gradient.cols, kLeastColumns));
    codes_.emplace(inner_, width_, left.dtype);
    if (gradient.dtype != left.dtype) {
      const std::int64_t fitting_rows = fitting(kProductBytes, width_) / kProductRows * kProductRows;
      product_.emplace(std::min(gradient.rows, std::max(kProductRows, fitting_rows)), width_, left.dtype);
    }
  }

  /// write(first, view) puts codes, from column `first` on, into a view of left's dtype.
  template <class Write>
  void run(const Write& write) {
    for (std::int64_t first = 0; first < gradient_.cols; first += width_) {
      const std::int64_t cols = std::min(width_, gradient_.cols - first);
      const MatrixView codes = columns(codes_->view(), 0, cols);
      write(first, codes);
      const MatrixView out = columns(gradient_, first, cols);
      if (product_.has_value()) {
        multiply_by_rows(codes, out);
      } else {
        matmul_(left_, transposed_, codes, out);
      }
    }
  }

 private:
  // Rows of so many elements that fit into so many bytes.
  std::int64_t fitting(std::int64_t bytes, std::int64_t elements) const {
    return bytes / (std::max<std::int64_t>(1, elements) * static_cast<std::int64_t>(size_of(left_.dtype)));
  }

  void multiply_by_rows(ConstMatrixView codes, MatrixView out) {
    const std::int64_t most = product_->view().rows;
    for (std::int64_t row = 0; row < out.rows; row += most) {
      const std::int64_t count = std::min(most, out.rows - row);
      const MatrixView product = columns(rows(product_->view(), 0, count), 0, out.cols);
      matmul_(transposed_ ? columns(left_, row, count) : rows(left_, row, count), transposed_, codes, product);
      copy_as(product, rows(out, row, count), executor_);
    }
  }

  ConstMatrixView left_;
  bool transposed_;
  std::int64_t inner_;  // The dimension that is summed over.
  MatrixView gradient_;
  const Matmul& matmul_;
  Executor& executor_;
  std::int64_t width_;              // Columns of a block.
  std::optional<Scratch> codes_;    // (inner, width)
  std::optional<Scratch> product_;  // (some rows, width)
};

// What is multiplied with codes.
DType operand_dtype(ConstMatrixView dy) { return dy.dtype == DType::bfloat16 ? DType::bfloat16 : DType::float32; }

void dx_by_matmul(ConstMatrixView dy, const TernaryWeight& w, MatrixView dx, const Matmul& matmul, Executor& executor) {
  Scratch scaled_dy(dy.rows, dy.cols, operand_dtype(dy));
  const MatrixView left = scaled_dy.view();
  const Factors factors = w.dy_factors();
  for_each_row(left, executor, [&](std::int64_t row) {
    row_functions().scaled(dy.row(row), dy.dtype, dy.cols, factors.values, factors.step, left.dtype, left.row(row));
  });
  BlockedProduct product(left, /*transposed=*/false, dx, kWeightBlockBytes, matmul, executor);
  product.run([&](std::int64_t first, MatrixView codes) { unpack_block(w, first, codes, executor); });
}

void dweight_by_matmul(ConstMatrixView dy, const QuantizedX& x, MatrixView dweight, const Matmul& matmul,
                       Executor& executor) {
  Scratch scaled_dy(dy.rows, dy.cols, x.has_codes() ? operand_dtype(dy) : DType::float32);
  const MatrixView left = scaled_dy.view();
  for_each_row(left, executor, [&](std::int64_t row) {
    row_functions().scaled(dy.row(row), dy.dtype, dy.cols, x.dy_factors(row).values, 0, left.dtype, left.row(row));
  });
  BlockedProduct product(left, /*transposed=*/true, dweight, kXBlockBytes, matmul, executor);
  product.run([&](std::int64_t first, MatrixView codes) { copy_block(x, first, codes, executor); });
}

// ---- arguments -----------------------------------------------------------------------------------------------------

void check_gradient(MatrixView gradient, std::int64_t rows, std::int64_t cols, const char* argument) {
  check_floating(gradient.dtype, argument);
  check_shape(gradient.rows, gradient.cols, rows, cols, argument);
}

bool is_grouped(const BitQuantConfig& config) { return config.weight_granularity == Granularity::per_group; }

// qx and its scale, as dweight needs them.
QuantizedX checked_x(const BackwardInputs& inputs, std::int64_t rows, const BitQuantConfig& config) {
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  if (int8) check_dtype(inputs.qx.dtype, DType::int8, "qx");
  if (!int8) check_floating(inputs.qx.dtype, "qx");
  check_shape(inputs.qx.rows, inputs.qx.cols, rows, inputs.qx.cols, "qx");
  check_view(inputs.qx, "qx");
  check_span(inputs.x_scale, "x_scale");
  if (inputs.qx.cols < 1) fail("qx has shape (", rows, ", ", inputs.qx.cols, "), expected at least one column");
  check_size(static_cast<std::int64_t>(inputs.x_scale.size()), int8 ? x_scale_size(rows, inputs.qx.cols, config) : 0,
             "x_scale");
  return {inputs.qx, x_scales(inputs.x_scale, inputs.qx.cols, config), is_grouped(config)};
}

// qweight and its scale, as dx needs them. @param packed Takes the bytes of plain int8 codes.
TernaryWeight checked_weight(const BackwardInputs& inputs, const BitQuantConfig& config,
                             std::vector<std::uint8_t>& packed) {
  ConstMatrixView weight = inputs.qweight;
  PackedShape shape;
  if (weight.dtype == DType::uint8) {
    shape = read_trailer(weight);
  } else {
    shape = packed_shape(weight.rows, weight.cols);
    check_view(weight, "qweight");
  }
  if (weight.dtype == DType::int8) {
    packed = pack_weights(weight);
    weight = {packed.data(), shape.out_features, shape.row_bytes()};
  }
  check_qweight_scale(inputs.qweight_scale, shape.out_features, shape.in_features, config);
  return {weight, weight_scales(inputs.qweight_scale, shape.in_features, config), shape, is_grouped(config)};
}

bool is_small(std::int64_t rows, std::int64_t out_features, std::int64_t in_features) {
  return rows <= kSmallRows && rows * out_features * in_features <= kSmallWork;
}

}  // namespace

void backward(ConstMatrixView dy, const BackwardInputs& inputs, const BitQuantConfig& config,
              const Gradients& gradients, Executor& executor, const Matmul& matmul) {
  check_floating(dy.dtype, "dy");
  check_view(dy, "dy");
  const auto by_loops = [&](std::int64_t in_features) { return !matmul || is_small(dy.rows, dy.cols, in_features); };
  check_config(config);
  const auto& [dx, dweight, dbias] = gradients;
  check_view(dx, "dx");
  check_view(dweight, "dweight");
  if (dx.data != nullptr) {
    std::vector<std::uint8_t> packed;
    const TernaryWeight w = checked_weight(inputs, config, packed);
    check_shape(dy.rows, dy.cols, dy.rows, w.shape.out_features, "dy");
    check_gradient(dx, dy.rows, w.shape.in_features, "dx");
    by_loops(dx.cols) ? dx_by_loops(dy, w, dx, executor) : dx_by_matmul(dy, w, dx, matmul, executor);
  }
  if (dweight.data != nullptr) {
    const QuantizedX x = checked_x(inputs, dy.rows, config);
    check_gradient(dweight, dy.cols, x.qx.cols, "dweight");
    by_loops(dweight.cols) ? dweight_by_loops(dy, x, dweight, executor)
                           : dweight_by_matmul(dy, x, dweight, matmul, executor);
  }
  if (dbias != nullptr) sum_rows(dy, dbias, executor);
}

void backward(ConstMatrixView dy, const SavedTensors& saved, const BitQuantConfig& config, const Gradients& gradients,
              Executor& executor, const Matmul& matmul) {
  const PackedShape& shape = saved.weights.shape;
  check_prepared(saved.weights);
  packed_shape(shape.out_features, shape.in_features, shape.layout);  // bounds of the sizes
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  const std::int64_t rows = int8 ? static_cast<std::int64_t>(saved.qx.size()) / shape.in_features : saved.x.rows;
  check_shape(dy.rows, dy.cols, rows, shape.out_features, "dy");
  const ConstMatrixView qx = int8 ? ConstMatrixView(saved.qx.data(), rows, shape.in_features) : saved.x;
  backward(dy, {qx, saved.x_scale, saved.weights.view(), saved.weights.scale}, config, gradients, executor, matmul);
}

}  // namespace bitcore::bitlinear
