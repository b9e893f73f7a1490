// Rewrites tiles of the 1.6-bit layout at 2 bits, in plain loops that compilers vectorize for the instruction set of
// the including file: every kernel reads both layouts, also one that knows 2 bits only.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <algorithm>

#include "ops/packing_internal.h"

namespace bitcore {
namespace {

/// 4 steps of 20 codes are 5 steps of 16: 20 groups of four adjacent k, a byte a k.
inline constexpr std::int64_t kRecodeSteps = 4;
inline constexpr std::int64_t kRecodeGroups = kRecodeSteps * kBase3StepCodes / 4;

/// The five groups of one step: digit f of every byte goes to group f. Returns the largest byte.
/// @param bytes Of the step, four for each row. @param groups [5][kTileRows * 4] @param count rows * 4
inline std::uint8_t base3_digits(const std::uint8_t* bytes, std::int64_t count, std::uint8_t* groups) {
  constexpr std::int64_t kGroup = kTileRows * 4;
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint8_t rest = bytes[i];
    largest = largest > rest ? largest : rest;
    for (int f = 0; f < kBase3Digits - 1; ++f) {
      const auto third = static_cast<std::uint8_t>((rest * 171u) >> 9);  // rest / 3, exact for a byte
      groups[f * kGroup + i] = static_cast<std::uint8_t>(rest - 3 * third);
      rest = third;
    }
    groups[(kBase3Digits - 1) * kGroup + i] = rest & 3;  // an invalid byte leaves 3 here, which 2 bits can hold
  }
  return largest;
}

/// TileFunctions::base3_recode.
inline std::uint32_t recode_base3(const std::uint8_t* tile, std::int64_t tile_rows, std::int64_t step_begin,
                                  std::int64_t step_end, std::uint8_t* recoded) {
  constexpr std::int64_t kGroup = kTileRows * 4;
  const std::int64_t count = tile_rows * 4;
  std::uint8_t groups[kRecodeGroups * kGroup];
  std::uint8_t largest = 0;
  for (std::int64_t begin = step_begin; begin < step_end; begin += kRecodeSteps) {
    const std::int64_t steps = std::min(kRecodeSteps, step_end - begin);
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::uint8_t found = base3_digits(tile + (begin + s) * count, count, groups + s * kBase3Digits * kGroup);
      largest = std::max(largest, found);
    }
    const std::int64_t words = (steps * kBase3Digits + 3) / 4;
    std::fill(groups + steps * kBase3Digits * kGroup, groups + words * 4 * kGroup, kZeroCode);
    for (std::int64_t w = 0; w < words; ++w, recoded += count) {
      const std::uint8_t* in = groups + 4 * w * kGroup;
      for (std::int64_t i = 0; i < count; ++i) {
        recoded[i] =
            static_cast<std::uint8_t>(in[i] | in[kGroup + i] << 2 | in[2 * kGroup + i] << 4 | in[3 * kGroup + i] << 6);
      }
    }
  }
  return largest > kMostBase3Byte ? 1u : 0u;
}

}  // namespace
}  // namespace bitcore
