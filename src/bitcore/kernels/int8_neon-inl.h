// What the int8 kernels with NEON registers share: the layout, the unpacking, the search for invalid codes.
//
// Packer: standard 2-bit form. CPU feature: NEON. A quarter of a step of a full tile is one register with an output row
// in each 32-bit lane. The code w + 1 is at most 2, hence also a signed operand; store takes the sum of a token's
// activations off every sum, which takes the 1 off again.
//
// Panel: [k / 4][16 rows] words of four codes.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <arm_neon.h>

#include "bitcore/packing/packing_internal.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
constexpr int kLanes = 4;
constexpr int kQuarters = 4;  // registers of a tile
// 16 rows x 1,024 bytes = 16 KiB of weights: at most half of a common L1 cache.
constexpr std::int64_t kBlock = 1024;

// ORs codes that are 3 into `invalid`; bits between the fields are noise until any_invalid() drops them.
uint32x4_t collect_invalid(uint32x4_t invalid, uint32x4_t words) {
  return vorrq_u32(invalid, vandq_u32(words, vshrq_n_u32(words, 1)));
}

std::uint32_t any_invalid(const uint32x4_t (&invalid)[kQuarters], std::int64_t rows) {
  std::uint32_t lanes[kRows];
  for (int quarter = 0; quarter < kQuarters; ++quarter) vst1q_u32(lanes + quarter * kLanes, invalid[quarter]);
  std::uint32_t any = 0;
  for (std::int64_t row = 0; row < rows; ++row) any |= lanes[row];
  return any & 0x55555555u;
}

// Where the tile has fewer than 16 rows the other lanes read what follows, in the end the trailer, which is long
// enough: their sums are never stored, their invalid codes are not looked at.
uint32x4_t load_quarter(const std::uint8_t* step, int quarter) {
  return vreinterpretq_u32_u8(vld1q_u8(step + quarter * kLanes * 4));
}

template <int Field>
int8x16_t field_codes(uint32x4_t words) {
  uint32x4_t shifted = words;
  if constexpr (Field > 0) shifted = vshrq_n_u32(words, 2 * Field);
  return vreinterpretq_s8_u8(vandq_u8(vreinterpretq_u8_u32(shifted), vdupq_n_u8(3)));
}

template <int Field>
void unpack_field(uint32x4_t words, std::int8_t* group) {
  vst1q_s8(group + Field * kRows * 4, field_codes<Field>(words));
}

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  auto* out = static_cast<std::int8_t*>(panel);
  uint32x4_t invalid[kQuarters] = {};
  for (std::int64_t step = step_begin; step < step_end; ++step, out += kStepCodes * kRows) {
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const uint32x4_t words = load_quarter(tiles + step * rows * 4, quarter);
      invalid[quarter] = collect_invalid(invalid[quarter], words);
      std::int8_t* group = out + quarter * kLanes * 4;
      unpack_field<0>(words, group);
      unpack_field<1>(words, group);
      unpack_field<2>(words, group);
      unpack_field<3>(words, group);
    }
  }
  return any_invalid(invalid, rows);
}

}  // namespace
}  // namespace bitcore
