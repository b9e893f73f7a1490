// Scales, quantization and its inverse; see docs/contract.md for every formula.
#include "bitcore/ops/base.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "bitcore/base/checks.h"
#include "bitcore/base/math.h"
#include "bitcore/base/parallel.h"
#include "bitcore/base/scales.h"
#include "bitcore/quantize/row_functions-inl.h"

namespace bitcore {
namespace {

// Folds block sums by the same rule until one is left.
double reduce_block_sums(std::vector<double> sums) {
  while (sums.size() > 1) {
    std::vector<double> next;
    const auto count = static_cast<std::int64_t>(sums.size());
    for (std::int64_t begin = 0; begin < count; begin += kSumBlock) {
      next.push_back(sum_in_lanes(&sums[static_cast<std::size_t>(begin)], std::min(kSumBlock, count - begin),
                                  [](double value) { return value; }));
    }
    sums = std::move(next);
  }
  return sums.front();
}

// Elements [begin, begin + count) of the row-major order as float32: in place where possible, else through `buffer`.
const float* flat_elements(ConstMatrixView m, std::int64_t begin, std::int64_t count, float* buffer) {
  const std::int64_t row = begin / m.cols;
  const std::int64_t col = begin % m.cols;
  const bool adjacent = m.row_stride == m.cols || col + count <= m.cols;
  if (m.dtype == DType::float32 && adjacent) return reinterpret_cast<const float*>(m.row(row)) + col;
  for (std::int64_t done = 0, r = row, c = col; done < count; ++r, c = 0) {
    const std::int64_t n = std::min(count - done, m.cols - c);
    widen(m.row(r) + static_cast<std::size_t>(c) * size_of(m.dtype), m.dtype, n, buffer + done);
    done += n;
  }
  return buffer;
}

double absolute_sum(ConstMatrixView m, Executor& executor) {
  const std::int64_t count = m.rows * m.cols;
  const std::int64_t blocks = ceil_div(count, kSumBlock);
  std::vector<double> sums(static_cast<std::size_t>(blocks));
  const auto sum_blocks = [&](std::int64_t first, std::int64_t last) {
    float buffer[kSumBlock];
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t begin = block * kSumBlock;
      const std::int64_t n = std::min(kSumBlock, count - begin);
      sums[static_cast<std::size_t>(block)] = row_functions().absolute_sum(flat_elements(m, begin, n, buffer), n);
    }
  };
  parallel_ranges(executor, blocks, /*min_range=*/16, sum_blocks);
  return reduce_block_sums(std::move(sums));
}

float weight_scale_of(double sum, std::int64_t count) {
  const auto mean = static_cast<float>(sum / static_cast<double>(count));
  if (!std::isfinite(mean)) return quiet_nan();
  return std::max(mean, kScaleFloor);
}

ConstMatrixView one_row(ConstMatrixView m, std::int64_t row) { return {m.row(row), m.dtype, 1, m.cols, m.cols}; }

void check_matrix(ConstMatrixView m, const char* argument) {
  check_view(m, argument);
  if (m.rows < 0 || m.cols < 1) fail(argument, " has shape (", m.rows, ", ", m.cols, "), expected at least one column");
}

void check_scale(std::span<const float> scale, std::int64_t expected) {
  check_size(static_cast<std::int64_t>(scale.size()), expected, "scale");
  check_span(scale, "scale");
}

// Row-wise quantization of either tensor.
template <class QuantizeRow>
void quantize_rows(ConstMatrixView in, Executor& executor, QuantizeRow quantize_row) {
  parallel_ranges(executor, in.rows, std::max<std::int64_t>(1, 65536 / in.cols),
                  [&](std::int64_t begin, std::int64_t end) {
                    std::vector<float> buffer(static_cast<std::size_t>(in.cols));
                    for (std::int64_t row = begin; row < end; ++row) {
                      quantize_row(row, flat_elements(one_row(in, row), 0, in.cols, buffer.data()));
                    }
                  });
}

void dequantize_rows(ConstMatrixView codes, std::span<const float> scale, MatrixView out) {
  for (std::int64_t row = 0; row < codes.rows; ++row) {
    const float s = scale_of_row(scale, row);
    const auto* in = reinterpret_cast<const std::int8_t*>(codes.row(row));
    auto* values = reinterpret_cast<float*>(out.row(row));
    for (std::int64_t k = 0; k < codes.cols; ++k) values[k] = static_cast<float>(in[k]) * s;
  }
}

void check_dequantize(ConstMatrixView codes, MatrixView out, const char* argument) {
  check_dtype(codes.dtype, DType::int8, argument);
  check_dtype(out.dtype, DType::float32, "the output");
  check_shape(out.rows, out.cols, codes.rows, codes.cols, "the output");
  check_view(codes, argument);
  check_view(out, "the output");
}

}  // namespace

void convert(ConstMatrixView from, MatrixView to) {
  check_floating(from.dtype, "from");
  check_floating(to.dtype, "to");
  check_shape(to.rows, to.cols, from.rows, from.cols, "to");
  check_view(from, "from");
  check_view(to, "to");
  std::vector<float> row(static_cast<std::size_t>(from.cols));
  for (std::int64_t r = 0; r < from.rows; ++r) {
    widen(from.row(r), from.dtype, from.cols, row.data());
    narrow(row.data(), from.cols, to.dtype, to.row(r));
  }
}

std::int64_t weight_scale_size(std::int64_t out_features, const BitQuantConfig& config) {
  if (out_features < 0) fail("out_features must be at least 0, got ", out_features);
  return config.weight_granularity == Granularity::per_tensor ? 1 : out_features;
}

std::int64_t x_scale_size(std::int64_t rows, const BitQuantConfig& config) {
  if (rows < 0) fail("rows must be at least 0, got ", rows);
  return config.activation_granularity == Granularity::per_tensor ? 1 : rows;
}

void compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config, std::span<float> scale,
                          Executor& executor) {
  check_floating(weight.dtype, "weight");
  check_matrix(weight, "weight");
  if (weight.rows < 1) fail("weight has shape (", weight.rows, ", ", weight.cols, "), expected at least one row");
  check_scale(scale, weight_scale_size(weight.rows, config));
  if (config.weight_granularity == Granularity::per_tensor) {
    scale[0] = weight_scale_of(absolute_sum(weight, executor), weight.rows * weight.cols);
    return;
  }
  parallel_ranges(executor, weight.rows, std::max<std::int64_t>(1, 65536 / weight.cols),
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t row = begin; row < end; ++row) {
                      scale[static_cast<std::size_t>(row)] =
                          weight_scale_of(absolute_sum(one_row(weight, row), serial_executor()), weight.cols);
                    }
                  });
}

std::vector<float> compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config) {
  check_matrix(weight, "weight");
  std::vector<float> scale(static_cast<std::size_t>(weight_scale_size(weight.rows, config)));
  compute_weight_scale(weight, config, scale);
  return scale;
}

void quantize_weight(ConstMatrixView weight, std::span<const float> scale, const BitQuantConfig& config,
                     MatrixView qweight, Executor& executor) {
  check_floating(weight.dtype, "weight");
  check_matrix(weight, "weight");
  check_dtype(qweight.dtype, DType::int8, "the output");
  check_shape(qweight.rows, qweight.cols, weight.rows, weight.cols, "the output");
  check_view(qweight, "the output");
  check_scale(scale, weight_scale_size(weight.rows, config));
  quantize_rows(weight, executor, [&](std::int64_t row, const float* values) {
    const float s = scale_of_row(scale, row);
    auto* out = reinterpret_cast<std::int8_t*>(qweight.row(row));
    for (std::int64_t k = 0; k < weight.cols; ++k) {
      out[k] = static_cast<std::int8_t>(static_cast<std::int32_t>(round_clamped(values[k] / s, -1.0f, 1.0f)));
    }
  });
}

void dequantize_weight(ConstMatrixView qweight, std::span<const float> scale, const BitQuantConfig& config,
                       MatrixView weight) {
  if (qweight.dtype == DType::uint8) {
    fail("qweight is packed (uint8); dequantize_weight takes int8 codes: call unpack_weights first");
  }
  check_dequantize(qweight, weight, "qweight");
  check_scale(scale, weight_scale_size(qweight.rows, config));
  dequantize_rows(qweight, scale, weight);
}

void compute_x_scale(ConstMatrixView x, const BitQuantConfig& config, std::span<float> scale, Executor& executor) {
  check_floating(x.dtype, "x");
  check_matrix(x, "x");
  check_scale(scale, x_scale_size(x.rows, config));
  if (config.activation_dtype == ActivationDtype::float32) {
    std::fill(scale.begin(), scale.end(), 1.0f);
    return;
  }
  std::vector<std::uint32_t> absmax(static_cast<std::size_t>(x.rows));
  quantize_rows(x, executor, [&](std::int64_t row, const float* values) {
    absmax[static_cast<std::size_t>(row)] = row_functions().absmax(values, x.cols);
  });
  if (config.activation_granularity == Granularity::per_channel) {
    std::transform(absmax.begin(), absmax.end(), scale.begin(), x_scale_of);
  } else {
    scale[0] = x_scale_of(absmax.empty() ? 0u : *std::max_element(absmax.begin(), absmax.end()));
  }
}

std::vector<float> compute_x_scale(ConstMatrixView x, const BitQuantConfig& config) {
  check_matrix(x, "x");
  std::vector<float> scale(static_cast<std::size_t>(x_scale_size(x.rows, config)));
  compute_x_scale(x, config, scale);
  return scale;
}

void quantize_x(ConstMatrixView x, std::span<const float> scale, const BitQuantConfig& config, MatrixView qx,
                Executor& executor) {
  if (config.activation_dtype == ActivationDtype::float32) {
    fail("activation_dtype is 'float32': such activations have no codes");
  }
  check_floating(x.dtype, "x");
  check_matrix(x, "x");
  check_dtype(qx.dtype, DType::int8, "the output");
  check_shape(qx.rows, qx.cols, x.rows, x.cols, "the output");
  check_view(qx, "the output");
  check_scale(scale, x_scale_size(x.rows, config));
  quantize_rows(x, executor, [&](std::int64_t row, const float* values) {
    const float s = scale_of_row(scale, row);
    row_functions().quantize_x(values, x.cols, s, reinterpret_cast<std::int8_t*>(qx.row(row)));
  });
}

void dequantize_x(ConstMatrixView qx, std::span<const float> scale, const BitQuantConfig& config, MatrixView x) {
  check_dequantize(qx, x, "qx");
  check_scale(scale, x_scale_size(qx.rows, config));
  dequantize_rows(qx, scale, x);
}

}  // namespace bitcore
