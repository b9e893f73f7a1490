// The loops of code_rows.h, which compilers vectorize for the instruction set of the including file.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <cstdint>

#include "bitcore/packing/code_rows.h"
#include "bitcore/packing/packing_internal.h"

namespace bitcore {
namespace {

/// Field f of byte j is code 4 f + j.
inline void pack_two_bit(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride) {
  for (std::int64_t step = 0; step < steps; ++step, codes += kStepCodes, words += word_stride) {
    store_word(words,
               load_word(codes) | load_word(codes + 4) << 2 | load_word(codes + 8) << 4 | load_word(codes + 12) << 6);
  }
}

/// Digit f of byte j is code 4 f + j. No byte exceeds 242: nothing is carried.
inline void pack_base3(const std::uint8_t* codes, std::int64_t steps, std::uint8_t* words, std::int64_t word_stride) {
  for (std::int64_t step = 0; step < steps; ++step, codes += kBase3StepCodes, words += word_stride) {
    std::uint32_t word = load_word(codes + 16);
    for (int f = 3; f >= 0; --f) word = 3 * word + load_word(codes + 4 * f);
    store_word(words, word);
  }
}

inline std::uint32_t unpack_two_bit(const std::uint8_t* words, std::int64_t word_stride, std::int64_t steps,
                                    std::uint8_t* codes) {
  std::uint32_t invalid = 0;
  for (std::int64_t step = 0; step < steps; ++step, words += word_stride, codes += kStepCodes) {
    const std::uint32_t word = load_word(words);
    invalid |= invalid_codes(word);
    for (int field = 0; field < 4; ++field) store_word(codes + 4 * field, (word >> (2 * field)) & 0x03030303u);
  }
  return invalid;
}

/// The quotient by 3 of each of the four bytes of a word: b / 3 = b * 171 / 512 for every byte.
inline std::uint32_t thirds(std::uint32_t word) {
  const std::uint32_t even = ((word & 0x00ff00ffu) * 171u >> 9) & 0x007f007fu;
  const std::uint32_t odd = ((word >> 8 & 0x00ff00ffu) * 171u >> 9) & 0x007f007fu;
  return even | odd << 8;
}

inline std::uint32_t unpack_base3(const std::uint8_t* words, std::int64_t word_stride, std::int64_t steps,
                                  std::uint8_t* codes) {
  std::uint32_t invalid = 0;
  for (std::int64_t step = 0; step < steps; ++step, words += word_stride, codes += kBase3StepCodes) {
    std::uint32_t rest = load_word(words);
    for (int digit = 0; digit < kBase3Digits; ++digit) {
      const std::uint32_t quotient = thirds(rest);
      store_word(codes + 4 * digit, rest - 3 * quotient);
      rest = quotient;
    }
    invalid |= rest;  // a byte of at most 242 has no sixth digit
  }
  return invalid;
}

inline void weights_of(const std::uint8_t* codes, std::int64_t count, DType dtype, void* out) {
  if (dtype == DType::int8) {
    auto* values = static_cast<std::int8_t*>(out);
    for (std::int64_t k = 0; k < count; ++k) values[k] = static_cast<std::int8_t>(codes[k] - 1);
  } else if (dtype == DType::float32) {
    auto* values = static_cast<float*>(out);
    for (std::int64_t k = 0; k < count; ++k) values[k] = static_cast<float>(static_cast<std::int32_t>(codes[k]) - 1);
  } else {
    const std::uint16_t one = dtype == DType::bfloat16 ? 0x3f80 : 0x3c00;
    auto* bits = static_cast<std::uint16_t*>(out);
    for (std::int64_t k = 0; k < count; ++k) {
      const std::uint16_t sign = codes[k] == 0 ? 0x8000 : 0;
      bits[k] = static_cast<std::uint16_t>(codes[k] == 1 ? 0 : one | sign);
    }
  }
}

constexpr CodeRows make_code_rows() {
  return {
      .pack_two_bit = pack_two_bit,
      .pack_base3 = pack_base3,
      .unpack_two_bit = unpack_two_bit,
      .unpack_base3 = unpack_base3,
      .weights_of = weights_of,
  };
}

}  // namespace
}  // namespace bitcore
