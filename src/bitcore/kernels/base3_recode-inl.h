// Rewrites tiles of the 1.6-bit layout at 2 bits, in plain loops that compilers vectorize for the instruction set of
// the including file: every kernel reads both layouts, also one that knows 2 bits only.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <algorithm>

#include "bitcore/packing/packing_internal.h"

namespace bitcore {
namespace {

/// 4 steps of 20 codes are 5 steps of 16.
inline constexpr std::int64_t kRecodeSteps = 4;
/// Most bytes of a step.
inline constexpr std::int64_t kRecodeBytes = kTileRows * 4;
/// How far ahead the next steps are fetched: beyond the page, where the hardware's own prefetching stops.
inline constexpr std::int64_t kRecodePrefetchBytes = 4096;

/// A byte of a step: its four lower digits as 2-bit fields, and the top one (3 where the byte is invalid).
struct Base3Fields {
  std::uint8_t low;
  std::uint8_t top;
};

/// Digit f is q_f - 3 q_(f+1), where q_f = byte / 3^f. So the sum of digit f times 4^f is q_0 + q_1 + 4 q_2 + 16 q_3 +
/// 64 q_4 modulo 256, which drops the top digit. A quotient is the upper half of a product with 2^16 / 3^f, rounded up.
constexpr Base3Fields base3_fields(std::uint8_t byte) {
  const auto quotient = [byte](std::uint32_t inverse) { return static_cast<std::uint16_t>((byte * inverse) >> 16); };
  const std::uint16_t top = quotient(810);
  const std::uint16_t low =
      static_cast<std::uint16_t>(byte + quotient(21846) + 4 * quotient(7282) + 16 * quotient(2428) + 64 * top);
  return {static_cast<std::uint8_t>(low), static_cast<std::uint8_t>(top)};
}

/// The fields of `count` bytes. Returns the largest byte.
[[gnu::always_inline]] inline std::uint8_t split_step(const std::uint8_t* bytes, std::int64_t count, std::uint8_t* low,
                                                      std::uint8_t* top) {
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    largest = largest > bytes[i] ? largest : bytes[i];
    const Base3Fields fields = base3_fields(bytes[i]);
    low[i] = fields.low;
    top[i] = fields.top;
  }
  return largest;
}

/// TileFunctions::base3_recode for `count` bytes a step: a constant lets whole tiles go through registers.
[[gnu::always_inline]] inline std::uint32_t recode_bytes(const std::uint8_t* tile, std::int64_t count,
                                                         std::int64_t step_begin, std::int64_t step_end,
                                                         std::uint8_t* recoded) {
  std::uint8_t largest = 0;
  for (std::int64_t begin = step_begin; begin < step_end; begin += kRecodeSteps) {
    alignas(64) std::uint8_t low[kRecodeSteps][kRecodeBytes], top[kRecodeSteps][kRecodeBytes];
    const std::int64_t steps = std::min(kRecodeSteps, step_end - begin);
    for (std::int64_t s = 0; s < steps; ++s) {
      __builtin_prefetch(tile + (begin + s) * count + kRecodePrefetchBytes);
      const std::uint8_t found = split_step(tile + (begin + s) * count, count, low[s], top[s]);
      largest = std::max(largest, found);
    }
    for (std::int64_t s = steps; s < kRecodeSteps; ++s) {  // absent ones: code 1
      std::fill_n(low[s], count, std::uint8_t{0x55});
      std::fill_n(top[s], count, kZeroCode);
    }
    std::uint8_t words[kRecodeSteps + 1][kRecodeBytes];
    for (std::int64_t i = 0; i < count; ++i) {
      words[0][i] = low[0][i];
      words[1][i] = static_cast<std::uint8_t>(top[0][i] | low[1][i] << 2);
      words[2][i] = static_cast<std::uint8_t>(low[1][i] >> 6 | top[1][i] << 2 | low[2][i] << 4);
      words[3][i] = static_cast<std::uint8_t>(low[2][i] >> 4 | top[2][i] << 4 | low[3][i] << 6);
      words[4][i] = static_cast<std::uint8_t>(low[3][i] >> 2 | top[3][i] << 6);
    }
    const std::int64_t present = (steps * kBase3StepCodes + kStepCodes - 1) / kStepCodes;
    for (std::int64_t w = 0; w < present; ++w, recoded += count) std::copy_n(words[w], count, recoded);
  }
  return largest > kMostBase3Byte ? 1u : 0u;
}

/// TileFunctions::base3_recode.
inline std::uint32_t recode_base3(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t step_begin,
                                  std::int64_t step_end, std::uint8_t* recoded) {
  if (tile_rows == kTileRows) return recode_bytes(tile, kRecodeBytes, step_begin, step_end, recoded);
  return recode_bytes(tile, tile_rows * 4, step_begin, step_end, recoded);
}

}  // namespace
}  // namespace bitcore
