// Error texts for arguments that do not fit, and the few checks that several public functions share.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "bitcore/exceptions.h"
#include "bitcore/tensor.h"

namespace bitcore {

/// Joins anything printable into the text of a QuantizationError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw QuantizationError(text.str());
}

/// Kernels call it after their loops have met a code that does not exist.
[[noreturn]] inline void fail_invalid_code() {
  fail("qweight holds an invalid code: a 2-bit field of 3, or a byte above 242 at 1.6 bits");
}

inline void check_floating(DType dtype, const char* argument) {
  if (!is_floating(dtype)) fail(argument, " must be float32, bfloat16 or float16, got ", to_string(dtype));
}

inline void check_dtype(DType dtype, DType expected, const char* argument) {
  if (dtype != expected) fail(argument, " must be ", to_string(expected), ", got ", to_string(dtype));
}

inline void check_shape(std::int64_t rows, std::int64_t cols, std::int64_t expected_rows, std::int64_t expected_cols,
                        const char* argument) {
  if (rows != expected_rows || cols != expected_cols) {
    fail(argument, " has shape (", rows, ", ", cols, "), expected (", expected_rows, ", ", expected_cols, ")");
  }
}

inline void check_size(std::int64_t size, std::int64_t expected, const char* argument) {
  if (size != expected) fail(argument, " has ", size, " elements, expected ", expected);
}

}  // namespace bitcore
