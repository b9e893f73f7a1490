// Loops over the codes of one row, compiled for several instruction sets: code_rows() has those of the best that this
// CPU has. All give the same bytes.
#pragma once

#include <cstdint>

#include "bitcore/tensor.h"

namespace bitcore {

struct CodeRows {
  /// Words of `steps` steps of one row, `word_stride` bytes apart.
  void (*pack_two_bit)(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride);
  void (*pack_base3)(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride);

  /// Their inverses; nonzero where a code is invalid.
  std::uint32_t (*unpack_two_bit)(const std::uint8_t* words, std::int64_t word_stride, std::int64_t steps,
                                  std::uint8_t* codes);
  std::uint32_t (*unpack_base3)(const std::uint8_t* words, std::int64_t word_stride, std::int64_t steps,
                                std::uint8_t* codes);

  /// out = codes - 1 as int8, float32, bfloat16 or float16.
  void (*weights_of)(const std::uint8_t* codes, std::int64_t count, DType dtype, void* out);
};

extern const CodeRows kPortableCodeRows;  // code_rows_portable.cc
extern const CodeRows kAvx2CodeRows;      // code_rows_avx2.cc
extern const CodeRows kAvx512CodeRows;    // code_rows_avx512.cc

/// Those of the best instruction set of this CPU.
const CodeRows& code_rows();

}  // namespace bitcore
