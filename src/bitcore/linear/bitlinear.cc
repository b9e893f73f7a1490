// prepare_weights, forward and backward: validation at the public boundary, then one kernel call.
#include "bitcore/ops/bitlinear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "bitcore/base/checks.h"
#include "bitcore/base/parallel.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/kernels/tile_functions.h"
#include "bitcore/ops/base.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"
#include "bitcore/quantize/row_functions.h"

namespace bitcore::bitlinear {
namespace {

// The width of x that a qweight of either form takes.
std::int64_t in_features_of(ConstMatrixView qweight) {
  if (qweight.dtype == DType::int8) {
    check_view(qweight, "qweight");
    return qweight.cols;
  }
  if (qweight.dtype != DType::uint8) {
    fail("qweight must be packed uint8 or int8 codes, got ", to_string(qweight.dtype));
  }
  return read_trailer(qweight).in_features;
}

void check_qweight_scale(std::span<const float> scale, std::int64_t out_features, const BitQuantConfig& config) {
  const auto size = static_cast<std::int64_t>(scale.size());
  check_span(scale, "qweight_scale");
  const std::int64_t expected = weight_scale_size(out_features, config);
  if (size != expected) {
    fail("qweight_scale has ", size, " elements, weight_granularity '", to_string(config.weight_granularity), "' with ",
         out_features, " out_features expects ", expected);
  }
}

void check_scale_values(std::span<const float> scale) {
  bool usable = true;
  for (const float value : scale) usable &= value > 0.0f && value <= std::numeric_limits<float>::max();
  for (std::size_t i = 0; !usable && i < scale.size(); ++i) {
    if (!(std::isfinite(scale[i]) && scale[i] > 0.0f)) {
      fail("qweight_scale must be finite and positive, got ", scale[i], " at ", i);
    }
  }
}

// Everything that can be checked in constant time.
void check_forward(ConstMatrixView x, std::span<const float> qweight_scale, ConstMatrixView qweight,
                   ConstVectorView bias, const BitQuantConfig& config, MatrixView y) {
  const std::int64_t in_features = in_features_of(qweight);
  if (x.cols != in_features) fail("x has ", x.cols, " features, qweight expects ", in_features);
  check_qweight_scale(qweight_scale, qweight.rows, config);
  check_view(bias, "bias");
  if (bias) {
    check_floating(bias.dtype, "bias");
    if (bias.size != qweight.rows) fail("bias has ", bias.size, " elements, qweight has ", qweight.rows, " rows");
  }
  check_floating(y.dtype, "y");
  check_shape(y.rows, y.cols, x.rows, qweight.rows, "y");
  check_view(y, "y");
}

// The view of its bytes is made from its shape.
void check_prepared(const PreparedWeights& weights) {
  const PackedShape& shape = weights.shape;
  if (static_cast<std::int64_t>(weights.qweight.size()) != shape.bytes()) {
    fail("weights.qweight has ", weights.qweight.size(), " bytes, weights.shape (", shape.out_features, ", ",
         shape.row_bytes(), ") takes ", shape.bytes());
  }
}

KernelRegistry::KernelPtr kernel_of(const BitQuantConfig& config, const Options& options) {
  return options.kernel.empty() ? KernelRegistry::get_kernel_for_config(config)
                                : KernelRegistry::get_kernel_by_name(options.kernel, config);
}

Executor& executor_of(const Options& options) {
  return options.executor != nullptr ? *options.executor : default_executor();
}

void run_kernel(LinearArgs args, const Options& options) {
  const KernelRegistry::KernelPtr kernel = kernel_of(args.config, options);
  args.executor = &executor_of(options);
  const int threads = threads_of(*args.executor);
  if (args.qweight.dtype == DType::uint8) {
    check_span(options.workspace, "workspace");
    if (!options.workspace.empty()) {
      const PackedShape shape = read_trailer(args.qweight);
      const std::size_t needed = kernel->workspace_size(args.x.rows, shape, args.config, threads);
      if (options.workspace.size() < needed) {
        fail("workspace has ", options.workspace.size(), " bytes, this call needs ", needed, ": see workspace_size");
      }
      args.workspace = options.workspace;
    }
    (*kernel)(args);
    return;
  }
  const std::vector<std::uint8_t> packed = pack_weights(args.qweight);
  const PackedShape shape = packed_shape(args.qweight.rows, args.qweight.cols);
  args.qweight = {packed.data(), shape.out_features, shape.row_bytes()};
  (*kernel)(args);
}

void check_weight(ConstMatrixView weight) {
  check_floating(weight.dtype, "weight");
  packed_shape(weight.rows, weight.cols);  // bounds of the sizes
  check_view(weight, "weight");
}

// Packs rows [begin, end): codes by comparison instead of division. For a scale s >= 1e-5, h = s / 2 is exact, and
// round(w / s) >= 1 exactly where the rounded quotient exceeds 0.5, which it does exactly where w > h: the next float
// above h is h * (1 + e) with e > 2^-24, and 0.5 * (1 + e) rounds above 0.5. A non-finite weight has a NaN scale, which
// gives codes 0.
void pack_rows(ConstMatrixView weight, std::span<const float> scale, const PackedShape& shape, std::int64_t begin,
               std::int64_t end, std::uint8_t* payload) {
  std::vector<float> buffer(static_cast<std::size_t>(weight.cols));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()), kZeroCode);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* values = reinterpret_cast<const float*>(weight.row(row));
    if (weight.dtype != DType::float32) {
      widen(weight.row(row), weight.dtype, weight.cols, buffer.data());
      values = buffer.data();
    }
    const float half = 0.5f * scale[scale.size() == 1 ? 0 : static_cast<std::size_t>(row)];
    row_functions().ternary_codes(values, weight.cols, half, codes.data());
    pack_code_row(codes.data(), shape, row, payload);
  }
}

}  // namespace

void prepare_weights_into(ConstMatrixView weight, const BitQuantConfig& config, Layout layout, NonFinite non_finite,
                          std::span<float> scale, MatrixView qweight, Executor& executor) {
  check_weight(weight);
  const PackedShape shape = packed_shape(weight.rows, weight.cols, layout);
  check_packed_output(qweight, shape);
  compute_weight_scale(weight, config, scale, executor);
  if (non_finite == NonFinite::reject) {
    for (std::size_t i = 0; i < scale.size(); ++i) {
      if (std::isnan(scale[i])) {
        const std::string where = scale.size() == 1 ? "" : " in row " + std::to_string(i);
        fail("weight holds a NaN or an infinity", where, "; it must be finite");
      }
    }
  }
  auto* bytes = static_cast<std::uint8_t*>(qweight.data);
  // Whole tiles only: rows of a tile share cache lines.
  const std::int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows;
  parallel_ranges(executor, tiles, std::max<std::int64_t>(1, 4096 / weight.cols),
                  [&](std::int64_t begin, std::int64_t end) {
                    pack_rows(weight, scale, shape, begin * kTileRows, std::min(weight.rows, end * kTileRows), bytes);
                  });
  write_trailer(shape, bytes);
}

PreparedWeights prepare_weights(ConstMatrixView weight, const BitQuantConfig& config, Layout layout,
                                Executor& executor) {
  check_weight(weight);
  PreparedWeights prepared;
  prepared.shape = packed_shape(weight.rows, weight.cols, layout);
  prepared.scale.resize(static_cast<std::size_t>(weight_scale_size(weight.rows, config)));
  prepared.qweight.resize(static_cast<std::size_t>(prepared.shape.bytes()));
  prepare_weights_into(weight, config, layout, NonFinite::reject, prepared.scale,
                       {prepared.qweight.data(), weight.rows, prepared.shape.row_bytes()}, executor);
  return prepared;
}

std::size_t workspace_size(std::int64_t rows, const PackedShape& shape, const BitQuantConfig& config,
                           const Options& options) {
  if (rows < 0) fail("rows must be at least 0, got ", rows);
  packed_shape(shape.out_features, shape.in_features, shape.layout);  // bounds of the sizes
  const KernelRegistry::KernelPtr kernel = kernel_of(config, options);
  const int threads = threads_of(executor_of(options));
  // Fewer rows may go another way, which may need more.
  std::size_t bytes = 0;
  for (std::int64_t fewer = std::min<std::int64_t>(rows, kMostDirectTokens + 1); fewer >= 1; --fewer) {
    bytes = std::max(bytes, kernel->workspace_size(fewer, shape, config, threads));
  }
  return std::max(bytes, kernel->workspace_size(rows, shape, config, threads));
}

void forward(ConstMatrixView x, std::span<const float> qweight_scale, ConstMatrixView qweight, ConstVectorView bias,
             const BitQuantConfig& config, MatrixView y, const Options& options) {
  check_floating(x.dtype, "x");
  check_view(x, "x");
  check_forward(x, qweight_scale, qweight, bias, config, y);
  check_scale_values(qweight_scale);
  run_kernel({x, {}, qweight_scale, qweight, bias, config, y, nullptr}, options);
}

void forward(ConstMatrixView x, const PreparedWeights& weights, ConstVectorView bias, const BitQuantConfig& config,
             MatrixView y, const Options& options) {
  check_prepared(weights);
  forward(x, weights.scale, weights.view(), bias, config, y, options);
}

void forward_quantized(ConstMatrixView qx, std::span<const float> x_scale, std::span<const float> qweight_scale,
                       ConstMatrixView qweight, ConstVectorView bias, const BitQuantConfig& config, MatrixView y,
                       const Options& options) {
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  if (int8) check_dtype(qx.dtype, DType::int8, "qx");
  if (!int8) check_floating(qx.dtype, "qx");
  check_view(qx, "qx");
  check_size(static_cast<std::int64_t>(x_scale.size()), int8 ? x_scale_size(qx.rows, config) : 0, "x_scale");
  check_span(x_scale, "x_scale");
  check_forward(qx, qweight_scale, qweight, bias, config, y);
  run_kernel({qx, x_scale, qweight_scale, qweight, bias, config, y, nullptr}, options);
}

SavedTensors forward_training(ConstMatrixView x, ConstMatrixView weight, ConstVectorView bias,
                              const BitQuantConfig& config, MatrixView y, const Options& options) {
  check_floating(x.dtype, "x");
  check_view(x, "x");
  check_weight(weight);
  if (x.cols != weight.cols) fail("x has ", x.cols, " features, weight expects ", weight.cols);
  Executor& executor = executor_of(options);
  SavedTensors saved;
  PreparedWeights& weights = saved.weights;
  weights.shape = packed_shape(weight.rows, weight.cols);
  weights.scale.resize(static_cast<std::size_t>(weight_scale_size(weight.rows, config)));
  weights.qweight.resize(static_cast<std::size_t>(weights.shape.bytes()));
  prepare_weights_into(weight, config, Layout::automatic, NonFinite::keep, weights.scale,
                       {weights.qweight.data(), weight.rows, weights.shape.row_bytes()}, executor);
  if (config.activation_dtype == ActivationDtype::float32) {
    saved.x = x;
    forward_quantized(x, {}, weights.scale, weights.view(), bias, config, y, options);
    return saved;
  }
  saved.x_scale.resize(static_cast<std::size_t>(x_scale_size(x.rows, config)));
  saved.qx.resize(static_cast<std::size_t>(x.rows * x.cols));
  const MatrixView qx(saved.qx.data(), x.rows, x.cols);
  compute_x_scale(x, config, saved.x_scale, executor);
  quantize_x(x, saved.x_scale, config, qx, executor);
  forward_quantized(qx, saved.x_scale, weights.scale, weights.view(), bias, config, y, options);
  return saved;
}

namespace {

// out[k] += factor * in[k]
void add_scaled(const float* in, float factor, std::int64_t count, float* out) {
  for (std::int64_t k = 0; k < count; ++k) out[k] += factor * in[k];
}

void check_gradient(MatrixView gradient, std::int64_t rows, std::int64_t cols, const char* argument) {
  check_floating(gradient.dtype, argument);
  check_shape(gradient.rows, gradient.cols, rows, cols, argument);
}

float* float_row(MatrixView m, std::int64_t row) { return reinterpret_cast<float*>(m.row(row)); }

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

struct Factors {
  const float* values;
  std::int64_t step;  // 0: one for all

  explicit Factors(std::span<const float> scale) : values(scale.data()), step(scale.size() == 1 ? 0 : 1) {}
  const float* at(std::int64_t index) const { return values + index * step; }
};

// dX = (dY * s_w) @ q_w
void backward_x(ConstMatrixView dy, const BackwardInputs& inputs, const PackedShape& shape, MatrixView dx,
                Executor& executor) {
  const FloatMatrix sums(dx);
  const Factors scale(inputs.qweight_scale);
  parallel_ranges(executor, dx.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()));
    std::vector<float> weights(static_cast<std::size_t>(shape.in_features));
    std::vector<float> scaled_dy(static_cast<std::size_t>((end - begin) * dy.cols));
    for (std::int64_t m = begin; m < end; ++m) {
      std::fill_n(float_row(sums.view, m), dx.cols, 0.0f);
      row_functions().scaled(dy.row(m), dy.dtype, dy.cols, scale.values, scale.step, DType::float32,
                             &scaled_dy[static_cast<std::size_t>((m - begin) * dy.cols)]);
    }
    for (std::int64_t n = 0; n < shape.out_features; ++n) {
      unpack_code_row(static_cast<const std::uint8_t*>(inputs.qweight.data), shape, n, codes.data());
      row_functions().weights_of(codes.data(), shape.in_features, DType::float32, weights.data());
      for (std::int64_t m = begin; m < end; ++m) {
        const float factor = scaled_dy[static_cast<std::size_t>((m - begin) * dy.cols + n)];
        add_scaled(weights.data(), factor, shape.in_features, float_row(sums.view, m));
      }
    }
    for (std::int64_t m = begin; m < end && dx.dtype != DType::float32; ++m) {
      narrow(float_row(sums.view, m), dx.cols, dx.dtype, dx.row(m));
    }
  });
}

// dW = (dY * s_x)^T @ q_x
void backward_weight(ConstMatrixView dy, const BackwardInputs& inputs, MatrixView dweight, Executor& executor) {
  const FloatMatrix sums(dweight);
  const bool int8 = inputs.qx.dtype == DType::int8;
  const float one = 1.0f;
  const Factors scale(int8 ? inputs.x_scale : std::span(&one, 1));
  parallel_ranges(executor, dweight.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> x(static_cast<std::size_t>(dweight.cols)), scaled_dy(static_cast<std::size_t>(end - begin));
    for (std::int64_t n = begin; n < end; ++n) std::fill_n(float_row(sums.view, n), dweight.cols, 0.0f);
    const auto first = static_cast<std::size_t>(begin) * size_of(dy.dtype);
    for (std::int64_t m = 0; m < dy.rows; ++m) {
      row_functions().scaled(dy.row(m) + first, dy.dtype, end - begin, scale.at(m), 0, DType::float32,
                             scaled_dy.data());
      if (int8) {
        row_functions().codes_as_floats(reinterpret_cast<const std::int8_t*>(inputs.qx.row(m)), dweight.cols,
                                        DType::float32, x.data());
      } else {
        widen(inputs.qx.row(m), inputs.qx.dtype, dweight.cols, x.data());
      }
      for (std::int64_t n = begin; n < end; ++n) {
        add_scaled(x.data(), scaled_dy[static_cast<std::size_t>(n - begin)], dweight.cols, float_row(sums.view, n));
      }
    }
    for (std::int64_t n = begin; n < end && dweight.dtype != DType::float32; ++n) {
      narrow(float_row(sums.view, n), dweight.cols, dweight.dtype, dweight.row(n));
    }
  });
}

// In float64: there may be many rows.
void backward_bias(ConstMatrixView dy, float* dbias, Executor& executor) {
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

// qx and its scale, as dweight needs them.
void check_quantized_x(const BackwardInputs& inputs, std::int64_t rows, std::int64_t in_features,
                       const BitQuantConfig& config) {
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  if (int8) check_dtype(inputs.qx.dtype, DType::int8, "qx");
  if (!int8) check_floating(inputs.qx.dtype, "qx");
  check_shape(inputs.qx.rows, inputs.qx.cols, rows, in_features, "qx");
  check_view(inputs.qx, "qx");
  check_span(inputs.x_scale, "x_scale");
  check_size(static_cast<std::int64_t>(inputs.x_scale.size()), int8 ? x_scale_size(rows, config) : 0, "x_scale");
}

}  // namespace

void backward(ConstMatrixView dy, const BackwardInputs& inputs, const BitQuantConfig& config,
              const Gradients& gradients, Executor& executor) {
  check_floating(dy.dtype, "dy");
  check_view(dy, "dy");
  const auto& [dx, dweight, dbias] = gradients;
  check_view(dx, "dx");
  check_view(dweight, "dweight");
  if (dx.data != nullptr) {
    const PackedShape shape = read_trailer(inputs.qweight);
    check_shape(dy.rows, dy.cols, dy.rows, shape.out_features, "dy");
    check_qweight_scale(inputs.qweight_scale, shape.out_features, config);
    check_gradient(dx, dy.rows, shape.in_features, "dx");
    backward_x(dy, inputs, shape, dx, executor);
  }
  if (dweight.data != nullptr) {
    check_quantized_x(inputs, dy.rows, inputs.qx.cols, config);
    check_gradient(dweight, dy.cols, inputs.qx.cols, "dweight");
    backward_weight(dy, inputs, dweight, executor);
  }
  if (dbias != nullptr) backward_bias(dy, dbias, executor);
}

void backward(ConstMatrixView dy, const SavedTensors& saved, const BitQuantConfig& config, const Gradients& gradients,
              Executor& executor) {
  const PackedShape& shape = saved.weights.shape;
  check_prepared(saved.weights);
  packed_shape(shape.out_features, shape.in_features, shape.layout);  // bounds of the sizes
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  const std::int64_t rows = int8 ? static_cast<std::int64_t>(saved.qx.size()) / shape.in_features : saved.x.rows;
  check_shape(dy.rows, dy.cols, rows, shape.out_features, "dy");
  const ConstMatrixView qx = int8 ? ConstMatrixView(saved.qx.data(), rows, shape.in_features) : saved.x;
  backward(dy, {qx, saved.x_scale, saved.weights.view(), saved.weights.scale}, config, gradients, executor);
}

}  // namespace bitcore::bitlinear
