/// @file tensor.h
/// Views of memory that the caller owns. The engine copies no tensor that it can read in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ranges>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace bitcore {

/// Element types that the engine reads or writes.
enum class DType : std::uint8_t { float32, bfloat16, float16, int8, uint8 };

/// "float32", "bfloat16", "float16", "int8" or "uint8".
std::string_view to_string(DType dtype);

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::float32 ? 4 : (dtype == DType::bfloat16 || dtype == DType::float16) ? 2 : 1;
}

/// float32, bfloat16 or float16.
constexpr bool is_floating(DType dtype) { return size_of(dtype) > 1; }

namespace detail {
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<std::int8_t> {
  static constexpr DType value = DType::int8;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::uint8;
};

template <class Range>
inline constexpr bool kHoldsFloats = std::is_same_v<std::ranges::range_value_t<Range>, float>;

template <class Range>
concept FloatRange = std::ranges::contiguous_range<Range> && std::ranges::sized_range<Range> && kHoldsFloats<Range>;
}  // namespace detail

/// A matrix to read: `rows` rows of `cols` adjacent elements, `row_stride` elements apart. Every function that takes
/// one throws a QuantizationError for negative sizes, for several rows that overlap (`row_stride` below `cols`), and
/// for elements without memory.
struct ConstMatrixView {
  const void* data = nullptr;    ///< First element of the first row.
  DType dtype = DType::float32;  ///< Of the elements.
  std::int64_t rows = 0;         ///< Number of rows.
  std::int64_t cols = 0;         ///< Elements in a row.
  std::int64_t row_stride = 0;   ///< Elements from the start of a row to the start of the next.

  ConstMatrixView() = default;
  /// A matrix of any dtype; its rows may lie apart.
  ConstMatrixView(const void* data, DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t row_stride)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride) {}
  /// A contiguous matrix of float, int8_t or uint8_t.
  template <class T>
  ConstMatrixView(const T* data, std::int64_t rows, std::int64_t cols)
      : ConstMatrixView(data, detail::DTypeOf<T>::value, rows, cols, cols) {}

  /// First byte of a row.
  const std::byte* row(std::int64_t index) const {
    return static_cast<const std::byte*>(data) + static_cast<std::size_t>(index * row_stride) * size_of(dtype);
  }
};

/// A matrix to write, laid out like ConstMatrixView.
struct MatrixView {
  void* data = nullptr;          ///< First element of the first row.
  DType dtype = DType::float32;  ///< Of the elements.
  std::int64_t rows = 0;         ///< Number of rows.
  std::int64_t cols = 0;         ///< Elements in a row.
  std::int64_t row_stride = 0;   ///< Elements from the start of a row to the start of the next.

  MatrixView() = default;
  /// A matrix of any dtype; its rows may lie apart.
  MatrixView(void* data, DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t row_stride)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride) {}
  /// A contiguous matrix of float, int8_t or uint8_t.
  template <class T>
  MatrixView(T* data, std::int64_t rows, std::int64_t cols)
      : MatrixView(data, detail::DTypeOf<T>::value, rows, cols, cols) {}

  /// The same matrix, to read.
  operator ConstMatrixView() const { return {data, dtype, rows, cols, row_stride}; }

  /// First byte of a row.
  std::byte* row(std::int64_t index) const {
    return static_cast<std::byte*>(data) + static_cast<std::size_t>(index * row_stride) * size_of(dtype);
  }
};

/// A vector to read: `size` adjacent elements. `data == nullptr` stands for "none" where an argument is optional.
struct ConstVectorView {
  const void* data = nullptr;    ///< First element; null: no vector.
  DType dtype = DType::float32;  ///< Of the elements.
  std::int64_t size = 0;         ///< Number of elements.

  ConstVectorView() = default;
  /// A vector of any dtype.
  ConstVectorView(const void* data, DType dtype, std::int64_t size) : data(data), dtype(dtype), size(size) {}
  /// A vector of float.
  ConstVectorView(const float* data, std::int64_t size) : ConstVectorView(data, DType::float32, size) {}
  /// A std::vector, std::span, ... of float.
  template <detail::FloatRange Range>
  ConstVectorView(const Range& values) : ConstVectorView(std::ranges::data(values), std::ranges::ssize(values)) {}

  /// Whether there is a vector.
  explicit operator bool() const { return data != nullptr; }

  /// The elements of a float32 vector; of any other none.
  std::span<const float> floats() const {
    if (dtype != DType::float32) return {};
    return {static_cast<const float*>(data), static_cast<std::size_t>(size)};
  }
};

/// A vector to write.
struct VectorView {
  void* data = nullptr;          ///< First element.
  DType dtype = DType::float32;  ///< Of the elements.
  std::int64_t size = 0;         ///< Number of elements.

  VectorView() = default;
  /// A vector of any dtype.
  VectorView(void* data, DType dtype, std::int64_t size) : data(data), dtype(dtype), size(size) {}
  /// A std::vector, std::span, ... of float.
  template <detail::FloatRange Range>
  VectorView(Range&& values)
      : VectorView(std::ranges::data(values), DType::float32, static_cast<std::int64_t>(std::ranges::size(values))) {}

  /// The same vector, to read.
  operator ConstVectorView() const { return {data, dtype, size}; }
};

/// A floating vector that owns its elements, of any dtype: the scales of a weight.
class FloatVector {
 public:
  FloatVector() = default;
  /// Zeros.
  /// @throws QuantizationError for a dtype that is not floating, or a negative size.
  FloatVector(DType dtype, std::int64_t size);
  /// A copy of a floating vector.
  explicit FloatVector(ConstVectorView values);

  DType dtype() const { return dtype_; }                                                           ///< Of the elements.
  std::int64_t size() const { return static_cast<std::int64_t>(bits_.size() / size_of(dtype_)); }  ///< Elements.
  const std::byte* data() const { return bits_.data(); }                                           ///< First byte.
  float operator[](std::int64_t index) const;  ///< An element, widened.

  /// To read.
  operator ConstVectorView() const { return {bits_.data(), dtype_, size()}; }
  /// To write.
  operator VectorView() { return {bits_.data(), dtype_, size()}; }

  /// Equal in dtype, size and all bits.
  friend bool operator==(const FloatVector&, const FloatVector&) = default;

 private:
  DType dtype_ = DType::float32;
  std::vector<std::byte> bits_;
};

}  // namespace bitcore
