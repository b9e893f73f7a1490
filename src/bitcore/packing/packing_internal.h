// Pieces of packing that prepare_weights and the kernels share.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "bitcore/ops/packing.h"

namespace bitcore {

/// Codes of one row in one 32-bit word, at 2 bits and at 1.6.
inline constexpr std::int64_t kStepCodes = step_codes(Layout::two_bit);
inline constexpr std::int64_t kBase3StepCodes = step_codes(Layout::base3);

/// Five digits in base 3 make a byte of at most 242.
inline constexpr int kBase3Digits = 5;
inline constexpr std::uint8_t kMostBase3Byte = 242;

/// The code of weight 0, also that of padding.
inline constexpr std::uint8_t kZeroCode = 1;

// Both supported architectures are little-endian, as the format is.
static_assert(std::endian::native == std::endian::little, "big-endian machines need byte swaps here");

inline std::uint32_t load_word(const std::uint8_t* bytes) {
  std::uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

inline void store_word(std::uint8_t* bytes, std::uint32_t word) { std::memcpy(bytes, &word, sizeof(word)); }

/// Nonzero where one of the 16 two-bit fields is 3.
inline std::uint32_t invalid_codes(std::uint32_t word) { return word & (word >> 1) & 0x55555555u; }

/// Packs one row of codes (0, 1, 2), padded with kZeroCode to shape.padded_in_features().
void pack_code_row(const std::uint8_t* codes, const PackedShape& shape, std::int64_t row, std::uint8_t* payload);

/// Inverse of pack_code_row, padding included; nonzero where a code is invalid.
std::uint32_t unpack_code_row(const std::uint8_t* payload, const PackedShape& shape, std::int64_t row,
                              std::uint8_t* codes);

/// Writes everything behind the payload, the checksum of which it computes.
void write_trailer(const PackedShape& shape, std::uint8_t* packed);

/// Validates dtype, shape and contiguity of a buffer that is to be packed into.
void check_packed_output(MatrixView packed, const PackedShape& shape);

/// The constant-time checks of a packed weight; returns the sizes that its trailer states.
PackedShape read_trailer(ConstMatrixView packed);

}  // namespace bitcore
