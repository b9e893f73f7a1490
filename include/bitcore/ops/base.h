/// @file base.h
/// Scales, quantization and its inverse. Mirrors `bitcore.ops.base`; formulas from BitNet b1.58 (arXiv 2402.17764).
///
/// Numbers: every quotient is a correctly rounded float32 division, every rounding is half to even.
/// bfloat16 and float16 input is widened to float32 first. Every function checks its arguments and throws
/// QuantizationError for a shape or dtype that does not fit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// Smallest scale of a weight and smallest absmax of an activation.
inline constexpr float kScaleFloor = 1e-5f;

/// Smallest scale of a group of weights: the smallest normal float16.
inline constexpr float kGroupScaleFloor = 0x1p-14f;

/// Groups of a row: ceil(in_features / group_size) where the weight's scales are per group, otherwise 1.
std::int64_t weight_groups(std::int64_t in_features, const BitQuantConfig& config);

/// Number of weight scales: 1 per tensor, `out_features` per channel, `out_features * weight_groups` per group (in
/// row-major order).
std::int64_t weight_scale_size(std::int64_t out_features, std::int64_t in_features, const BitQuantConfig& config);

/// float32; float16 where they are per group.
DType weight_scale_dtype(const BitQuantConfig& config);

/// Number of activation scales, which are float32: 1 per tensor, `rows` per channel, `rows * weight_groups` per group.
std::int64_t x_scale_size(std::int64_t rows, std::int64_t in_features, const BitQuantConfig& config);

/// absmean: max(float32(sum|W| / n), 1e-5), the float64 sum in the fixed order of docs/contract.md; of a group
/// float16(max(float32(sum|W| / n), 2^-14)).
/// NaN where a weight that it covers is NaN or infinite, or where the mean of a group is above 65,504, the largest
/// float16.
/// @param weight (out_features, in_features), floating.
/// @param scale weight_scale_size() elements of weight_scale_dtype().
void compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config, VectorView scale,
                          Executor& executor = serial_executor());

/// The same into a new vector.
FloatVector compute_weight_scale(ConstMatrixView weight, const BitQuantConfig& config);

/// clamp(round(W / scale), -1, 1) as int8; 0 where the quotient is NaN.
void quantize_weight(ConstMatrixView weight, ConstVectorView scale, const BitQuantConfig& config, MatrixView qweight,
                     Executor& executor = serial_executor());

/// qweight * scale as float32.
/// @param qweight int8 (out_features, in_features).
void dequantize_weight(ConstMatrixView qweight, ConstVectorView scale, const BitQuantConfig& config, MatrixView weight);

/// max(absmax, 1e-5) / 127; NaN where x has a NaN or an infinity among the elements that it covers.
/// float32 activations: 1.
void compute_x_scale(ConstMatrixView x, const BitQuantConfig& config, std::span<float> scale,
                     Executor& executor = serial_executor());

/// The same into a new vector.
std::vector<float> compute_x_scale(ConstMatrixView x, const BitQuantConfig& config);

/// clamp(round(x / scale), -128, 127) as int8; 0 where the scale or the quotient is NaN.
/// @throws QuantizationError where the config's activations are float32: they have no codes.
void quantize_x(ConstMatrixView x, std::span<const float> scale, const BitQuantConfig& config, MatrixView qx,
                Executor& executor = serial_executor());

/// qx * scale as float32.
/// @param qx int8 (rows, in_features).
void dequantize_x(ConstMatrixView qx, std::span<const float> scale, const BitQuantConfig& config, MatrixView x);

/// Copies a floating matrix to another floating dtype: widened exactly, or rounded once to nearest, ties to even. What
/// a kernel of your own reads a bias and writes its y with.
void convert(ConstMatrixView from, MatrixView to);

}  // namespace bitcore
