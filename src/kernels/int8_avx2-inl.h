// What the int8 kernels with 256-bit registers share: the layout, the unpacking, the search for invalid codes.
//
// Packer: standard 2-bit form. CPU features: AVX2. Half a step of a full tile is one register with an output row in
// each 32-bit lane. The code w + 1 is the unsigned operand; the driver starts every sum at minus the sum of the token's
// activations.
//
// Panel: [k / 4][16 rows] words of four codes; tokens: [k / 4][token] words of four activations.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <immintrin.h>

#include "kernels/int8_words-inl.h"
#include "ops/packing_internal.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
constexpr int kLanes = 8;
constexpr int kHalves = 2;  // registers of a tile
// 16 rows x 1,024 bytes = 16 KiB of weights and 6 x 1,024 = 6 KiB of activations share an L1 cache of 32 KiB.
constexpr std::int64_t kBlock = 1024;

__m256i low_fields() { return _mm256_set1_epi8(0x03); }

__m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

__m256i broadcast_word(const void* activations) {
  std::int32_t word;
  std::memcpy(&word, activations, sizeof(word));
  return _mm256_set1_epi32(word);
}

// ORs codes that are 3 into `invalid`; bits between the fields are noise until any_invalid() drops them.
__m256i collect_invalid(__m256i invalid, __m256i words) {
  return _mm256_or_si256(invalid, _mm256_and_si256(words, _mm256_srli_epi32(words, 1)));
}

std::uint32_t any_invalid(__m256i invalid, __m256i lanes) {
  return _mm256_testz_si256(invalid, _mm256_and_si256(lanes, _mm256_set1_epi32(0x55555555))) ? 0u : 1u;
}

// All bits of the lanes of one half of a tile that hold rows.
__m256i lane_mask(std::int64_t rows, int half) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows) - half * kLanes), lanes);
}

// Field `Field` of every byte of `words`.
template <int Field>
__m256i field_codes(__m256i words) {
  return _mm256_and_si256(_mm256_srli_epi32(words, 2 * Field), low_fields());
}

// One half of a step. Where the tile has fewer than 16 rows the other lanes read what follows, in the end the trailer,
// which is long enough: their sums are never stored, their invalid codes are masked. (Masked loads would be exact, but
// ran at a quarter of the speed from memory.)
__m256i load_half(const std::uint8_t* step, int half) { return load(step + half * kLanes * 4); }

std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  std::uint32_t invalid = 0;
  for (int half = 0; half < kHalves; ++half) {
    __m256i half_invalid = _mm256_setzero_si256();
    auto* out = static_cast<__m256i*>(panel) + half;
    for (std::int64_t step = step_begin; step < step_end; ++step, out += 4 * kHalves) {
      const __m256i words = load_half(tiles + step * rows * 4, half);
      half_invalid = collect_invalid(half_invalid, words);
      _mm256_store_si256(out, field_codes<0>(words));
      _mm256_store_si256(out + kHalves, field_codes<1>(words));
      _mm256_store_si256(out + 2 * kHalves, field_codes<2>(words));
      _mm256_store_si256(out + 3 * kHalves, field_codes<3>(words));
    }
    invalid |= any_invalid(half_invalid, lane_mask(rows, half));
  }
  return invalid;
}

}  // namespace
}  // namespace bitcore
