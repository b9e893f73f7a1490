// Error texts for arguments that do not fit, and the few checks that several public functions share.
#pragma once

#include <cstdint>
#include <span>
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

/// The same as a FileError, whose text begins with the file's path, or with what stands for it.
template <class... Parts>
[[noreturn]] void fail_file(const std::string& path, const Parts&... parts) {
  std::ostringstream text;
  ((text << path << ": ") << ... << parts);
  throw FileError(text.str());
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

/// A view's sizes and memory, which every public function checks before it reads or writes any of it.
inline void check_view(ConstMatrixView m, const char* argument) {
  if (m.rows < 0 || m.cols < 0) fail(argument, " has shape (", m.rows, ", ", m.cols, "), expected sizes of at least 0");
  if (m.rows == 0 || m.cols == 0) return;
  if (m.data == nullptr) fail(argument, " is null, expected memory of shape (", m.rows, ", ", m.cols, ")");
  const std::int64_t row_stride = m.rows == 1 ? m.cols : m.row_stride;
  if (row_stride < m.cols)
    fail(argument, " has row_stride ", row_stride, ", expected at least its ", m.cols, " columns");
  constexpr std::int64_t kMostElements = std::int64_t{1} << 60;
  if (row_stride > kMostElements / m.rows) {
    fail(argument, " has ", m.rows, " rows of row_stride ", row_stride, ", expected at most ", kMostElements,
         " elements");
  }
}

/// An optional vector: no memory stands for none, and has no elements.
inline void check_view(ConstVectorView v, const char* argument) {
  if (v.size < 0) fail(argument, " has ", v.size, " elements, expected at least 0");
  if (v.data == nullptr && v.size > 0) fail(argument, " is null, expected memory of ", v.size, " elements");
}

template <class T>
void check_span(std::span<T> values, const char* argument) {
  if (values.data() == nullptr && !values.empty()) {
    fail(argument, " is null, expected memory of ", values.size(), " elements");
  }
}

inline void check_size(std::int64_t size, std::int64_t expected, const char* argument) {
  if (size != expected) fail(argument, " has ", size, " elements, expected ", expected);
}

}  // namespace bitcore
