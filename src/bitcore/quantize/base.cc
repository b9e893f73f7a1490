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

float mean_of(double sum, std::int64_t count) { return static_cast<float>(sum / static_cast<double>(count)); }

float weight_scale_of(double sum, std::int64_t count) {
  const float mean = mean_of(sum, count);
  if (!std::isfinite(mean)) return quiet_nan();
  return std::max(mean, kScaleFloor);
}

// Bits of the float16 scale of a group.
std::uint16_t group_scale_of(double sum, std::int64_t count) {
  constexpr float kLargest = 65504.0f;
  const float mean = mean_of(sum, count);
  return float_to_float16(mean <= kLargest ? std::max(mean, kGroupScaleFloor) : quiet_nan());  // NaN is no less
}

ConstMatrixView one_row(ConstMatrixView m, std::int64_t row) { return {m.row(row), m.dtype, 1, m.cols, m.cols}; }

void check_matrix(ConstMatrixView m, const char* argument) {
  check_view(m, argument);
  if (m.rows < 0 || m.cols < 1) fail(argument, " has shape (", m.rows, ", ", m.cols, "), expected at least one column");
}

void check_scale(ConstVectorView scale, std::int64_t expected, DType dtype = DType::float32) {
  check_dtype(scale.dtype, dtype, "scale");
  check_size(scale.size, expected, "scale");
  check_view(scale, "scale");
}

void check_weight_scale(ConstVectorView scale, ConstMatrixView weight, const BitQuantConfig& config) {
  check_scale(scale, weight_scale_size(weight.rows, weight.cols, config), weight_scale_dtype(config));
}

void check_x_scale(ConstVectorView scale, ConstMatrixView x, const BitQuantConfig& config) {
  check_scale(scale, x_scale_size(x.rows, x.cols, config));
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

void dequantize_rows(ConstMatrixView codes, const Scales& scales, MatrixView out) {
  for (std::int64_t row = 0; row < codes.rows; ++row) {
    const auto* in = reinterpret_cast<const std::int8_t*>(codes.row(row));
    auto* values = reinterpret_cast<float*>(out.row(row));
    scales.for_each_group(row, codes.cols, [&](std::int64_t first, std::int64_t count, float scale) {
      for (std::int64_t k = first; k < first + count; ++k) values[k] = static_cast<float>(in[k]) * scale;
    });
  }
}

// The scales of rows [begin, end), whose groups are `Scales`'s.
void group_scales(ConstMatrixView weight, std::int64_t begin, std::int64_t end, const BitQuantConfig& config,
                  std::uint16_t* scale) {
  const std::int64_t groups = weight_groups(weight.cols, config);
  std::vector<float> buffer(static_cast<std::size_t>(weight.cols));
  for (std::int64_t row = begin; row < end; ++row) {
    const float* values = flat_elements(one_row(weight, row), 0, weight.cols, buffer.data());
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t first = group * config.group_size;
      const std::int64_t count = std::min(config.group_size, weight.cols - first);
      scale[row * groups + group] = group_scale_of(row_functions().absolute_sum(values + first, count), count);
    }
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

std::int64_t weight_groups(std::int64_t in_features, const BitQuantConfig& config) {
  check_config(config);
  if (in_features < 1) fail("in_features must be at least 1, got ", in_features);
  return config.weight_granularity == Granularity::per_group ? ceil_div(in_features, config.group_size) : 1;
}

std::int64_t weight_scale_size(std::int64_t out_features, std::int64_t in_features, const BitQuantConfig& config) {
  const std::int64_t groups = weight_groups(in_features, config);
  if (out_features < 0) fail("out_features must be at least 0, got ", out_features);
  return config.weight_granularity == Granularity::per_tensor ? 1 : out_features * groups;
}

DType weight_scale_dtype(const BitQuantConfig& config) {
  return config.weight_granularity == Granularity::per_group ? DType::float16 : DType::float32;
}

std::int64_t x_scale_size(std::int64_t rows, std::int64_t in_features, const BitQuantConfig& config) {
  const std::int64_t groups = weight_groups(in_features, config);
  if (rows < 0) fail("rows must be at least 0, got ", rows);
  if (config.activation_granularity == Granularity::per_tensor) return 1;
  return config.activation_granularity == Granularity::per_group ? rows * groups : rows;
}

void compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config, VectorView scale, Executor& executor) {
  check_floating(weight.dtype, "weight");
  check_matrix(weight, "weight");
  if (weight.rows < 1) fail("weight has shape (", weight.rows, ", ", weight.cols, "), expected at least one row");
  check_weight_scale(scale, weight, config);
  if (config.weight_granularity == Granularity::per_tensor) {
    *static_cast<float*>(scale.data) = weight_scale_of(absolute_sum(weight, executor), weight.rows * weight.cols);
    return;
  }
  parallel_ranges(executor, weight.rows, std::max<std::int64_t>(1, 65536 / weight.cols),
                  [&](std::int64_t begin, std::int64_t end) {
                    if (config.weight_granularity == Granularity::per_group) {
                      return group_scales(weight, begin, end, config, static_cast<std::uint16_t*>(scale.data));
                    }
                    for (std::int64_t row = begin; row < end; ++row) {
                      static_cast<float*>(scale.data)[row] =
                          weight_scale_of(absolute_sum(one_row(weight, row), serial_executor()), weight.cols);
                    }
                  });
}

FloatVector compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config) {
  check_matrix(weight, "weight");
  FloatVector scale(weight_scale_dtype(config), weight_scale_size(weight.rows, weight.cols, config));
  compute_weight_scale(weight, config, scale);
  return scale;
}

void quantize_weight(ConstMatrixView weight, ConstVectorView scale, const BitQuantConfig& config, MatrixView qweight,
                     Executor& executor) {
  check_floating(weight.dtype, "weight");
  check_matrix(weight, "weight");
  check_dtype(qweight.dtype, DType::int8, "the output");
  check_shape(qweight.rows, qweight.cols, weight.rows, weight.cols, "the output");
  check_view(qweight, "the output");
  check_weight_scale(scale, weight, config);
  const Scales scales = weight_scales(scale, weight.cols, config);
  quantize_rows(weight, executor, [&](std::int64_t row, const float* values) {
    auto* out = reinterpret_cast<std::int8_t*>(qweight.row(row));
    scales.for_each_group(row, weight.cols, [&](std::int64_t first, std::int64_t count, float s) {
      for (std::int64_t k = first; k < first + count; ++k) {
        out[k] = static_cast<std::int8_t>(static_cast<std::int32_t>(round_clamped(values[k] / s, -1.0f, 1.0f)));
      }
    });
  });
}

void dequantize_weight(ConstMatrixView qweight, ConstVectorView scale, const BitQuantConfig& config,
                       MatrixView weight) {
  if (qweight.dtype == DType::uint8) {
    fail("qweight is packed (uint8); dequantize_weight takes int8 codes: call unpack_weights first");
  }
  check_dequantize(qweight, weight, "qweight");
  check_matrix(qweight, "qweight");
  check_weight_scale(scale, qweight, config);
  dequantize_rows(qweight, weight_scales(scale, qweight.cols, config), weight);
}

void compute_x_scale(ConstMatrixView x, const BitQuantConfig& config, std::span<float> scale, Executor& executor) {
  check_floating(x.dtype, "x");
  check_matrix(x, "x");
  check_x_scale(scale, x, config);
  if (config.activation_dtype == ActivationDtype::float32) {
    std::fill(scale.begin(), scale.end(), 1.0f);
    return;
  }
  const bool per_tensor = config.activation_granularity == Granularity::per_tensor;
  const std::int64_t groups =
      config.activation_granularity == Granularity::per_group ? weight_groups(x.cols, config) : 1;
  const std::int64_t group_size = groups == 1 ? x.cols : config.group_size;
  std::vector<std::uint32_t> absmax(static_cast<std::size_t>(x.rows * groups));
  quantize_rows(x, executor, [&](std::int64_t row, const float* values) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t first = group * group_size;
      absmax[static_cast<std::size_t>(row * groups + group)] =
          row_functions().absmax(values + first, std::min(group_size, x.cols - first));
    }
  });
  if (per_tensor) {
    scale[0] = x_scale_of(absmax.empty() ? 0u : *std::max_element(absmax.begin(), absmax.end()));
  } else {
    std::transform(absmax.begin(), absmax.end(), scale.begin(), x_scale_of);
  }
}

std::vector<float> compute_x_scale(ConstMatrixView x, const BitQuantConfig& config) {
  check_matrix(x, "x");
  std::vector<float> scale(static_cast<std::size_t>(x_scale_size(x.rows, x.cols, config)));
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
  check_x_scale(scale, x, config);
  const Scales scales = x_scales(scale, x.cols, config);
  quantize_rows(x, executor, [&](std::int64_t row, const float* values) {
    auto* codes = reinterpret_cast<std::int8_t*>(qx.row(row));
    scales.for_each_group(row, x.cols, [&](std::int64_t first, std::int64_t count, float s) {
      row_functions().quantize_x(values + first, count, s, codes + first);
    });
  });
}

void dequantize_x(ConstMatrixView qx, std::span<const float> scale, const BitQuantConfig& config, MatrixView x) {
  check_dequantize(qx, x, "qx");
  check_matrix(qx, "qx");
  check_x_scale(scale, qx, config);
  dequantize_rows(qx, x_scales(scale, qx.cols, config), x);
}

}  // namespace bitcore
