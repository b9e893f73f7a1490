#include "bitmodels/relu.h"

#include <cstdint>

namespace bitmodels {
namespace {

template <class Bits>
void relu_bits(void* data, std::int64_t count, Bits sign, Bits infinity) {
  auto* values = static_cast<Bits*>(data);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool is_nan = static_cast<Bits>(values[i] & ~sign) > infinity;
    if ((values[i] & sign) != 0 && !is_nan) values[i] = 0;
  }
}

}  // namespace

void relu(bitcore::MatrixView x) {
  const std::int64_t count = x.rows * x.cols;
  if (x.dtype == bitcore::DType::float32) {
    relu_bits<std::uint32_t>(x.data, count, 0x80000000u, 0x7f800000u);
  } else {
    relu_bits<std::uint16_t>(x.data, count, 0x8000u, x.dtype == bitcore::DType::bfloat16 ? 0x7f80u : 0x7c00u);
  }
}

}  // namespace bitmodels
