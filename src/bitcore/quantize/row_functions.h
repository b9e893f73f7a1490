// Loops over one row or block that scales, quantization and backward are made of, compiled for several instruction
// sets: row_functions() has those of the best that this CPU has. All give the same bits.
#pragma once

#include <cstdint>

#include "bitcore/tensor.h"

namespace bitcore {

/// Elements of a block of the weight scale's sum (docs/contract.md).
inline constexpr std::int64_t kSumBlock = 4096;

struct RowFunctions {
  /// Sum of up to kSumBlock magnitudes in the fixed order of docs/contract.md.
  double (*absolute_sum)(const float* values, std::int64_t count);

  /// Bits of the largest magnitude; at or above those of infinity where one is not finite.
  std::uint32_t (*absmax)(const float* x, std::int64_t count);

  /// codes = clamp(round(x / scale), -128, 127), 0 where the quotient is NaN; returns their sum.
  std::int32_t (*quantize_x)(const float* x, std::int64_t count, float scale, std::int8_t* codes);

  /// codes = 1 + (w > half) - (w < -half): with half = scale / 2 the codes of clamp(round(w / scale), -1, 1).
  void (*ternary_codes)(const float* weight, std::int64_t count, float half, std::uint8_t* codes);

  /// out = codes as float32, bfloat16 or float16: exact.
  void (*codes_as_floats)(const std::int8_t* codes, std::int64_t count, DType dtype, void* out);

  /// out[group * out_stride + row] = scale as float32, for `groups` groups of `rows` rows, whose first float16 scales
  /// are `row_step` apart. Returns nonzero where one is not finite and positive.
  std::uint32_t (*transpose_scales)(const void* scales, std::int64_t row_step, std::int64_t rows, std::int64_t groups,
                                    float* out, std::int64_t out_stride);

  /// out = in * factor as float32, rounded once to out_dtype; element i takes factors[i * factor_step].
  void (*scaled)(const void* in, DType in_dtype, std::int64_t count, const float* factors, std::int64_t factor_step,
                 DType out_dtype, void* out);
};

extern const RowFunctions kPortableRowFunctions;  // row_functions_portable.cc
extern const RowFunctions kAvx2RowFunctions;      // row_functions_avx2.cc
extern const RowFunctions kAvx512RowFunctions;    // row_functions_avx512.cc

/// Those of the best instruction set of this CPU.
const RowFunctions& row_functions();

}  // namespace bitcore
