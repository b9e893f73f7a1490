// prepare_weights and forward: validation at the public boundary, then one kernel call. backward.cc has the gradients.
#include "bitcore/ops/bitlinear.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "bitcore/base/checks.h"
#include "bitcore/base/math.h"
#include "bitcore/base/parallel.h"
#include "bitcore/base/scales.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/linear/linear_internal.h"
#include "bitcore/ops/base.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"
#include "bitcore/quantize/row_functions.h"

namespace bitcore::bitlinear {
namespace {

// The sizes of a qweight of either form; those of codes once they are packed.
PackedShape shape_of(ConstMatrixView qweight) {
  if (qweight.dtype == DType::int8) {
    check_view(qweight, "qweight");
    return packed_shape(qweight.rows, qweight.cols);
  }
  if (qweight.dtype != DType::uint8) {
    fail("qweight must be packed uint8 or int8 codes, got ", to_string(qweight.dtype));
  }
  return read_trailer(qweight);
}

// Of float32 scales.
void check_scale_values(ConstVectorView scale) {
  bool usable = true;
  for (const float value : scale.floats()) usable &= value > 0.0f && value <= std::numeric_limits<float>::max();
  if (!usable) fail_unusable_scale(scale);
}

// Everything that can be checked in constant time. Returns the shape of qweight.
PackedShape check_forward(ConstMatrixView x, ConstVectorView qweight_scale, ConstMatrixView qweight,
                          ConstVectorView bias, const BitQuantConfig& config, MatrixView y) {
  const PackedShape shape = shape_of(qweight);
  if (x.cols != shape.in_features) fail("x has ", x.cols, " features, qweight expects ", shape.in_features);
  check_qweight_scale(qweight_scale, qweight.rows, shape.in_features, config);
  check_view(bias, "bias");
  if (bias) {
    check_floating(bias.dtype, "bias");
    if (bias.size != qweight.rows) fail("bias has ", bias.size, " elements, qweight has ", qweight.rows, " rows");
  }
  check_floating(y.dtype, "y");
  check_shape(y.rows, y.cols, x.rows, qweight.rows, "y");
  check_view(y, "y");
  return shape;
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
  check_span(options.workspace, "workspace");
  if (args.qweight.dtype == DType::int8) {
    const std::vector<std::uint8_t> packed = pack_weights(args.qweight);
    args.qweight = {packed.data(), args.shape.out_features, args.shape.row_bytes()};
    return (*kernel)(args);
  }
  if (!options.workspace.empty()) {
    const std::size_t needed = kernel->workspace_size(args.x.rows, args.shape, args.config, threads);
    if (options.workspace.size() < needed) {
      fail("workspace has ", options.workspace.size(), " bytes, this call needs ", needed, ": see workspace_size");
    }
    args.workspace = options.workspace;
  }
  (*kernel)(args);
}

void check_weight(ConstMatrixView weight) {
  check_floating(weight.dtype, "weight");
  packed_shape(weight.rows, weight.cols);  // bounds of the sizes
  check_view(weight, "weight");
}

// Packs rows [begin, end): codes by comparison instead of division. For a normal scale s, h = s / 2 is exact, and
// round(w / s) >= 1 exactly where the rounded quotient exceeds 0.5, which it does exactly where w > h: the next float
// above h is h * (1 + e) with e > 2^-24, and 0.5 * (1 + e) rounds above 0.5. A non-finite weight has a NaN scale, which
// gives codes 0.
void pack_rows(ConstMatrixView weight, const Scales& scales, const PackedShape& shape, std::int64_t begin,
               std::int64_t end, std::uint8_t* payload) {
  std::vector<float> buffer(static_cast<std::size_t>(weight.cols));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()), kZeroCode);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* values = reinterpret_cast<const float*>(weight.row(row));
    if (weight.dtype != DType::float32) {
      widen(weight.row(row), weight.dtype, weight.cols, buffer.data());
      values = buffer.data();
    }
    scales.for_each_group(row, weight.cols, [&](std::int64_t first, std::int64_t count, float scale) {
      row_functions().ternary_codes(values + first, count, 0.5f * scale, codes.data() + first);
    });
    pack_code_row(codes.data(), shape, row, payload);
  }
}

// Throws where a scale is NaN.
void check_finite(ConstMatrixView weight, const Scales& scales) {
  for (std::int64_t row = 0; row < (scales.row_step == 0 ? 1 : weight.rows); ++row) {
    scales.for_each_group(row, weight.cols, [&](std::int64_t first, std::int64_t count, float scale) {
      if (!std::isnan(scale)) return;
      if (scales.values.dtype != DType::float16) {
        fail("weight holds a NaN or an infinity", scales.row_step == 0 ? "" : " in row " + std::to_string(row),
             "; it must be finite");
      }
      fail("weight holds a NaN, an infinity, or magnitudes of a mean above 65504, which float16 cannot hold, in row ",
           row, ", columns ", first, " to ", first + count - 1);
    });
  }
}

}  // namespace

void prepare_weights_into(ConstMatrixView weight, const BitQuantConfig& config, Layout layout, NonFinite non_finite,
                          VectorView scale, MatrixView qweight, Executor& executor) {
  check_weight(weight);
  const PackedShape shape = packed_shape(weight.rows, weight.cols, layout);
  check_packed_output(qweight, shape);
  compute_weight_scale(weight, config, scale, executor);
  const Scales scales = weight_scales(scale, weight.cols, config);
  if (non_finite == NonFinite::reject) check_finite(weight, scales);
  auto* bytes = static_cast<std::uint8_t*>(qweight.data);
  // Whole tiles only: rows of a tile share cache lines.
  const std::int64_t tiles = ceil_div(weight.rows, kTileRows);
  parallel_ranges(executor, tiles, std::max<std::int64_t>(1, 4096 / weight.cols),
                  [&](std::int64_t begin, std::int64_t end) {
                    pack_rows(weight, scales, shape, begin * kTileRows, std::min(weight.rows, end * kTileRows), bytes);
                  });
  write_trailer(shape, bytes);
}

PreparedWeights prepare_weights(ConstMatrixView weight, const BitQuantConfig& config, Layout layout,
                                Executor& executor) {
  check_weight(weight);
  PreparedWeights prepared;
  prepared.shape = packed_shape(weight.rows, weight.cols, layout);
  prepared.scale = FloatVector(weight_scale_dtype(config), weight_scale_size(weight.rows, weight.cols, config));
  prepared.qweight.resize(static_cast<std::size_t>(prepared.shape.bytes()));
  prepare_weights_into(weight, config, layout, NonFinite::reject, prepared.scale,
                       {prepared.qweight.data(), weight.rows, prepared.shape.row_bytes()}, executor);
  return prepared;
}

std::size_t workspace_size(std::int64_t rows, const PackedShape& shape, const BitQuantConfig& config,
                           const Options& options) {
  if (rows < 0) fail("rows must be at least 0, got ", rows);
  check_config(config);
  packed_shape(shape.out_features, shape.in_features, shape.layout);  // bounds of the sizes
  return kernel_of(config, options)->workspace_size(rows, shape, config, threads_of(executor_of(options)));
}

void forward(ConstMatrixView x, ConstVectorView qweight_scale, ConstMatrixView qweight, ConstVectorView bias,
             const BitQuantConfig& config, MatrixView y, const Options& options) {
  check_floating(x.dtype, "x");
  check_view(x, "x");
  const PackedShape shape = check_forward(x, qweight_scale, qweight, bias, config, y);
  const bool groups = config.weight_granularity == Granularity::per_group;
  if (!groups) check_scale_values(qweight_scale);
  run_kernel({x, {}, qweight_scale, qweight, shape, bias, config, y, nullptr, {}, groups}, options);
}

void forward(ConstMatrixView x, const PreparedWeights& weights, ConstVectorView bias, const BitQuantConfig& config,
             MatrixView y, const Options& options) {
  check_prepared(weights);
  forward(x, weights.scale, weights.view(), bias, config, y, options);
}

void forward_quantized(ConstMatrixView qx, std::span<const float> x_scale, ConstVectorView qweight_scale,
                       ConstMatrixView qweight, ConstVectorView bias, const BitQuantConfig& config, MatrixView y,
                       const Options& options) {
  const bool int8 = config.activation_dtype == ActivationDtype::int8;
  if (int8) check_dtype(qx.dtype, DType::int8, "qx");
  if (!int8) check_floating(qx.dtype, "qx");
  check_view(qx, "qx");
  const PackedShape shape = check_forward(qx, qweight_scale, qweight, bias, config, y);
  check_size(static_cast<std::int64_t>(x_scale.size()), int8 ? x_scale_size(qx.rows, qx.cols, config) : 0, "x_scale");
  check_span(x_scale, "x_scale");
  run_kernel({qx, x_scale, qweight_scale, qweight, shape, bias, config, y, nullptr}, options);
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
  weights.scale = FloatVector(weight_scale_dtype(config), weight_scale_size(weight.rows, weight.cols, config));
  weights.qweight.resize(static_cast<std::size_t>(weights.shape.bytes()));
  prepare_weights_into(weight, config, Layout::automatic, NonFinite::keep, weights.scale,
                       {weights.qweight.data(), weight.rows, weights.shape.row_bytes()}, executor);
  if (config.activation_dtype == ActivationDtype::float32) {
    saved.x = x;
    forward_quantized(x, {}, weights.scale, weights.view(), bias, config, y, options);
    return saved;
  }
  saved.x_scale.resize(static_cast<std::size_t>(x_scale_size(x.rows, x.cols, config)));
  saved.qx.resize(static_cast<std::size_t>(x.rows * x.cols));
  const MatrixView qx(saved.qx.data(), x.rows, x.cols);
  compute_x_scale(x, config, saved.x_scale, executor);
  quantize_x(x, saved.x_scale, config, qx, executor);
  forward_quantized(qx, saved.x_scale, weights.scale, weights.view(), bias, config, y, options);
  return saved;
}

}  // namespace bitcore::bitlinear
