// What the int8 kernels share that read activations as 32-bit words of four.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include "ops/packing_internal.h"

namespace bitcore {
namespace {

/// TileFunctions::pack_tokens to [k / 4][token] words.
inline void pack_token_words(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count,
                             void* packed) {
  auto* out = static_cast<std::uint8_t*>(packed);
  for (std::int64_t k = 0; k < k_count; k += 4) {
    for (std::int64_t m = 0; m < tokens; ++m, out += 4) {
      store_word(out, load_word(static_cast<const std::uint8_t*>(x) + m * row_stride + k));
    }
  }
}

}  // namespace
}  // namespace bitcore
