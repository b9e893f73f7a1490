#include "bitcore/tensor.h"

#include <cstring>

#include "bitcore/base/checks.h"
#include "bitcore/base/float_types-inl.h"

namespace bitcore {

std::string_view to_string(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::int8:
      return "int8";
    case DType::uint8:
      return "uint8";
  }
  return "unknown";
}

FloatVector::FloatVector(DType dtype, std::int64_t size) : dtype_(dtype) {
  check_floating(dtype, "dtype");
  if (size < 0) fail("size must be at least 0, got ", size);
  bits_.resize(static_cast<std::size_t>(size) * size_of(dtype));
}

FloatVector::FloatVector(ConstVectorView values) : dtype_(values.dtype) {
  check_floating(values.dtype, "values");
  check_view(values, "values");
  const auto* bytes = static_cast<const std::byte*>(values.data);
  bits_.assign(bytes, bytes + static_cast<std::size_t>(values.size) * size_of(dtype_));
}

float FloatVector::operator[](std::int64_t index) const { return widened(bits_.data(), dtype_, index); }

}  // namespace bitcore
