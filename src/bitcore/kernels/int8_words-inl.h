// What the int8 kernels share that read activations as 32-bit words of four.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include "bitcore/packing/packing_internal.h"

namespace bitcore {
namespace {

typedef std::uint32_t Words __attribute__((vector_size(16)));

inline Words load_words(const std::uint8_t* bytes) {
  Words words;
  std::memcpy(&words, bytes, sizeof(words));
  return words;
}

/// Four words of four tokens, whose rows are `row_stride` apart, to four rows of words that are `stride` bytes apart.
inline void transpose_words(const std::uint8_t* x, std::int64_t row_stride, std::uint8_t* out, std::int64_t stride) {
  const Words a = load_words(x), b = load_words(x + row_stride);
  const Words c = load_words(x + 2 * row_stride), d = load_words(x + 3 * row_stride);
  const Words ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Words cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Words rows[] = {
      __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
      __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &rows[i], sizeof(Words));
}

/// TileFunctions::pack_tokens to [k / 4][token] words.
inline void pack_token_words(const void* x, std::int64_t row_stride, std::int64_t tokens, std::int64_t k_count,
                             void* packed) {
  const auto* rows = static_cast<const std::uint8_t*>(x);
  auto* out = static_cast<std::uint8_t*>(packed);
  if (tokens == 1) {
    std::memcpy(out, rows, static_cast<std::size_t>(k_count));
    return;
  }
  std::int64_t k = 0;
  for (; k + 16 <= k_count; k += 16, out += 16 * tokens) {
    std::int64_t m = 0;
    for (; m + 4 <= tokens; m += 4) transpose_words(rows + m * row_stride + k, row_stride, out + 4 * m, 4 * tokens);
    for (; m < tokens; ++m) {
      for (int i = 0; i < 4; ++i) store_word(out + 4 * (i * tokens + m), load_word(rows + m * row_stride + k + 4 * i));
    }
  }
  for (; k < k_count; k += 4, out += 4 * tokens) {
    for (std::int64_t m = 0; m < tokens; ++m) store_word(out + 4 * m, load_word(rows + m * row_stride + k));
  }
}

}  // namespace
}  // namespace bitcore
