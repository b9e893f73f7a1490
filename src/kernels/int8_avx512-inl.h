// int8 activations with AVX-512 VNNI: vpdpbusd multiplies 64 codes by 64 activations and adds groups of four.
//
// Packer: standard form. CPU features: AVX-512 F, BW, DQ, VL, VNNI; where the including file is compiled for VBMI as
// well, functions for the 1.6-bit layout. A 64-byte step of a full tile is one register with an output row in each
// 32-bit lane, so that no sum crosses lanes. The code w + 1 is the unsigned operand; the driver starts every sum at
// minus the sum of the token's activations, which takes the 1 off again.
//
// Panel: [k / 4][32 rows] words of four codes; tokens: [k / 4][token] words of four activations.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/base3_recode-inl.h"
#include "kernels/builtin.h"
#include "kernels/int8_words-inl.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = 2 * kTileRows;
// 12 tokens x 2 registers of sums, 2 of weights and some for broadcasts fill the 32 registers.
constexpr int kTokens = 12;
// 32 rows x 640 bytes = 20 KiB of weights and 12 x 640 = 7.5 KiB of activations share an L1 cache of 32 KiB.
constexpr std::int64_t kBlock = 640;
constexpr int kDirectTokens = 12;
// Where that many registers suffice every group of a token has sums of its own, which saves shifting the weights.
constexpr int kMostSumsApart = 16;
// Steps after which these sums are folded. Of those at 2 bits the largest, worth 64 times its value, reaches
// 64 * 2 * 128 * 4 * steps, below 2^31 up to 32,767 steps; at 1.6 bits, worth 81 times its value, up to 25,890.
constexpr std::int64_t kFoldSteps = 16384;
// How far ahead of the weights being multiplied the next ones are fetched: beyond the page, where the hardware's own
// prefetching stops.
constexpr std::int64_t kPrefetchBytes = 4096;

// acc += codes * activations. The empty statement ties the sum to one register: without it GCC 12 copies sums around
// and spills some of them.
void multiply_add(__m512i& acc, __m512i codes, __m512i activations) {
  acc = _mm512_dpbusd_epi32(acc, codes, activations);
  asm("" : "+v"(acc));
}

__m512i broadcast_word(const void* activations) {
  std::int32_t word;
  std::memcpy(&word, activations, sizeof(word));
  return _mm512_set1_epi32(word);
}

// ---- the layouts ---------------------------------------------------------------------------------------------------

__mmask16 row_mask(std::int64_t rows) { return static_cast<__mmask16>((1u << rows) - 1u); }

__m512i load_step(const std::uint8_t* step, __mmask16 rows) { return _mm512_maskz_loadu_epi32(rows, step); }

__m512i low_fields() { return _mm512_set1_epi8(0x03); }

// 2 bits: the four fields of a byte are the codes of four groups of k.
struct TwoBit {
  static constexpr int kGroups = 4;
  using Words = __m512i;

  static Words load(const std::uint8_t* step, __mmask16 rows) { return load_step(step, rows); }

  // ORs codes that are 3 into `invalid`; bits between the fields are noise until any() drops them.
  static __m512i collect(__m512i invalid, const Words& words) {
    return _mm512_or_si512(invalid, _mm512_and_si512(words, _mm512_srli_epi32(words, 1)));
  }
  static std::uint32_t any(__m512i invalid) {
    return static_cast<std::uint32_t>(_mm512_reduce_or_epi32(invalid)) & 0x55555555u;
  }

  template <int Group>
  static __m512i codes(const Words& words) {
    return _mm512_and_si512(Group == 0 ? words : _mm512_srli_epi32(words, 2 * Group), low_fields());
  }

  // The codes where they are in the word, worth 4^Group times their value.
  template <int Group>
  static __m512i scaled_codes(const Words& words) {
    return _mm512_and_si512(words, _mm512_set1_epi8(static_cast<char>(0x03 << (2 * Group))));
  }
  template <int Group>
  static __m512i unscaled(__m512i sum) {
    return _mm512_srai_epi32(sum, 2 * Group);
  }
};

#ifdef __AVX512VBMI__
constexpr std::array<std::uint8_t, 128> make_field_table() {
  std::array<std::uint8_t, 128> table{};
  for (int rest = 0; rest < 81; ++rest) {
    const int fields = rest % 3 | (rest / 3 % 3) << 2 | (rest / 9 % 3) << 4 | (rest / 27) << 6;
    table[static_cast<std::size_t>(rest)] = static_cast<std::uint8_t>(fields);
  }
  return table;
}

// 1.6 bits: the five digits of a byte in base 3 are the codes of five groups of k. Two rounds of b = min(b, b - 81) on
// unsigned bytes peel the top digit off; a look-up turns the rest, below 81, into four fields.
struct Base3 {
  static constexpr int kGroups = 5;
  static constexpr std::array<std::uint8_t, 128> kFieldTable = make_field_table();
  static constexpr std::uint32_t kInverseOf81 = 0x781948b1u;  // modulo 2^32
  static_assert(81u * kInverseOf81 == 1u);

  struct Words {
    __m512i bytes;
    __m512i fields;
    __m512i top;  // 81 times the top digit
  };

  static Words load(const std::uint8_t* step, __mmask16 rows) {
    const __m512i bytes = load_step(step, rows);
    const __m512i place = _mm512_set1_epi8(81);
    const __m512i once = _mm512_min_epu8(bytes, _mm512_sub_epi8(bytes, place));
    const __m512i rest = _mm512_min_epu8(once, _mm512_sub_epi8(once, place));
    const __m512i low = _mm512_loadu_si512(kFieldTable.data());
    const __m512i high = _mm512_loadu_si512(kFieldTable.data() + 64);
    return {bytes, _mm512_permutex2var_epi8(low, rest, high), _mm512_sub_epi8(bytes, rest)};
  }

  static __m512i collect(__m512i largest, const Words& words) { return _mm512_max_epu8(largest, words.bytes); }
  static std::uint32_t any(__m512i largest) {
    return _mm512_cmpgt_epu8_mask(largest, _mm512_set1_epi8(static_cast<char>(kMostBase3Byte))) != 0 ? 1u : 0u;
  }

  // 81 and 162 have 1 and 2 in bits 6 and 7.
  template <int Group>
  static __m512i codes(const Words& words) {
    if constexpr (Group == 4) return _mm512_and_si512(_mm512_srli_epi32(words.top, 6), low_fields());
    return TwoBit::codes<Group>(words.fields);
  }

  template <int Group>
  static __m512i scaled_codes(const Words& words) {
    if constexpr (Group == 4) return words.top;
    return TwoBit::scaled_codes<Group>(words.fields);
  }
  // 81 divides the sum of the top digits: a product with its inverse is the exact quotient.
  template <int Group>
  static __m512i unscaled(__m512i sum) {
    if constexpr (Group == 4) return _mm512_mullo_epi32(sum, _mm512_set1_epi32(static_cast<int>(kInverseOf81)));
    return TwoBit::unscaled<Group>(sum);
  }
};
#endif

// ---- many tokens ---------------------------------------------------------------------------------------------------

template <class Layout, int... Group>
void store_groups(const typename Layout::Words& words, std::uint8_t* panel, std::integer_sequence<int, Group...>) {
  (_mm512_store_si512(panel + Group * kRows * 4, Layout::template codes<Group>(words)), ...);
}

template <class Layout>
std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t payload_row_bytes, std::int64_t rows,
                           std::int64_t step_begin, std::int64_t step_end, void* panel) {
  constexpr auto kEach = std::make_integer_sequence<int, Layout::kGroups>();
  auto* out = static_cast<std::uint8_t*>(panel);
  const std::int64_t first_rows = rows < kTileRows ? rows : kTileRows;
  // A missing second tile is read as the first one again: its sums are never stored.
  const bool two = rows > kTileRows;
  const std::uint8_t* second = two ? tiles + kTileRows * payload_row_bytes : tiles;
  const std::int64_t second_rows = two ? rows - kTileRows : first_rows;
  const __mmask16 first_mask = row_mask(first_rows);
  const __mmask16 second_mask = row_mask(second_rows);
  __m512i invalid = _mm512_setzero_si512();
  for (std::int64_t step = step_begin; step < step_end; ++step, out += Layout::kGroups * kRows * 4) {
    const typename Layout::Words a = Layout::load(tiles + step * first_rows * 4, first_mask);
    const typename Layout::Words b = Layout::load(second + step * second_rows * 4, second_mask);
    invalid = Layout::collect(Layout::collect(invalid, a), b);
    store_groups<Layout>(a, out, kEach);
    store_groups<Layout>(b, out + kTileRows * 4, kEach);
  }
  return Layout::any(invalid);
}

template <int Tokens>
void gemm_tokens(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t k_count, std::int32_t* sums) {
  __m512i acc[Tokens][2];
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) {
    acc[m][0] = _mm512_load_si512(sums + m * kRows);
    acc[m][1] = _mm512_load_si512(sums + m * kRows + kTileRows);
  }
  for (std::int64_t k = 0; k < k_count; k += 4, weights += kRows * 4, x += Tokens * 4) {
    const __m512i first = _mm512_load_si512(weights);
    const __m512i second = _mm512_load_si512(weights + kTileRows * 4);
#pragma GCC unroll 12
    for (int m = 0; m < Tokens; ++m) {
      const __m512i activations = broadcast_word(x + 4 * m);
      multiply_add(acc[m][0], first, activations);
      multiply_add(acc[m][1], second, activations);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) {
    _mm512_store_si512(sums + m * kRows, acc[m][0]);
    _mm512_store_si512(sums + m * kRows + kTileRows, acc[m][1]);
  }
}

// Calls gemm_tokens<tokens>.
template <int Tokens = kTokens>
void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, void* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return gemm<Tokens - 1>(panel, packed_tokens, tokens, k_count, sums);
  }
  gemm_tokens<Tokens>(static_cast<const std::uint8_t*>(panel), static_cast<const std::uint8_t*>(packed_tokens), k_count,
                      static_cast<std::int32_t*>(sums));
}

// ---- few tokens ----------------------------------------------------------------------------------------------------

// Tiles of rows that are read together, so that they share the broadcasts of the activations.
struct Tile {
  const std::uint8_t* bytes;
  std::int64_t step_bytes;
  __mmask16 rows;
};

// acc[t][m] += the codes of a group of k in tile t times the activations of token m: sums of its own for each group, or
// one for all.
template <class Layout, int Group, int Tiles, int Tokens, int Sums>
void multiply_group(__m512i (&acc)[Tiles][Tokens][Sums], const typename Layout::Words (&words)[Tiles],
                    const std::uint8_t* x) {
  constexpr bool kApart = Sums > 1;
  __m512i codes[Tiles];
#pragma GCC unroll 2
  for (int t = 0; t < Tiles; ++t) {
    if constexpr (kApart) {
      codes[t] = Layout::template scaled_codes<Group>(words[t]);
    } else {
      codes[t] = Layout::template codes<Group>(words[t]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < Tokens; ++m) {
    const __m512i activations = broadcast_word(x + 4 * (Group * Tokens + m));
#pragma GCC unroll 2
    for (int t = 0; t < Tiles; ++t) multiply_add(acc[t][m][kApart ? Group : 0], codes[t], activations);
  }
}

template <class Layout, int Tiles, int Tokens, int Sums, int... Group>
void multiply_groups(__m512i (&acc)[Tiles][Tokens][Sums], const typename Layout::Words (&words)[Tiles],
                     const std::uint8_t* x, std::integer_sequence<int, Group...>) {
  (multiply_group<Layout, Group>(acc, words, x), ...);
}

// The sum over the groups, each divided by what its codes were worth.
template <class Layout, int... Group>
__m512i add_groups(const __m512i (&acc)[Layout::kGroups], std::integer_sequence<int, Group...>) {
  __m512i total = _mm512_setzero_si512();
  ((total = _mm512_add_epi32(total, Layout::template unscaled<Group>(acc[Group]))), ...);
  return total;
}

// Steps [begin, end) of all tiles, added to the sums.
template <class Layout, int Tiles, int Tokens, bool Apart>
void direct_steps(const Tile (&tiles)[Tiles], std::int64_t begin, std::int64_t end, const std::uint8_t* x,
                  __m512i (&invalid)[Tiles], std::int32_t* sums) {
  constexpr auto kEach = std::make_integer_sequence<int, Layout::kGroups>();
  __m512i acc[Tiles][Tokens][Apart ? Layout::kGroups : 1] = {};
  for (std::int64_t step = begin; step < end; ++step) {
    typename Layout::Words words[Tiles];
#pragma GCC unroll 2
    for (int t = 0; t < Tiles; ++t) {
      const std::uint8_t* bytes = tiles[t].bytes + step * tiles[t].step_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(bytes + kPrefetchBytes), _MM_HINT_T0);
      words[t] = Layout::load(bytes, tiles[t].rows);
      invalid[t] = Layout::collect(invalid[t], words[t]);
    }
    multiply_groups<Layout>(acc, words, x + step * 4 * Layout::kGroups * Tokens, kEach);
  }
#pragma GCC unroll 2
  for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 12
    for (int m = 0; m < Tokens; ++m) {
      std::int32_t* out = sums + m * kRows + t * kTileRows;
      __m512i total = acc[t][m][0];
      if constexpr (Apart) total = add_groups<Layout>(acc[t][m], kEach);
      _mm512_store_si512(out, _mm512_add_epi32(_mm512_load_si512(out), total));
    }
  }
}

template <class Layout, int Tiles, int Tokens>
std::uint32_t direct_tiles(const Tile (&tiles)[Tiles], std::int64_t steps, const std::uint8_t* x, std::int32_t* sums) {
  constexpr bool kApart = Tiles * Tokens * Layout::kGroups <= kMostSumsApart;
  __m512i invalid[Tiles] = {};
  for (std::int64_t begin = 0; begin < steps; begin += kFoldSteps) {
    const std::int64_t end = begin + kFoldSteps < steps ? begin + kFoldSteps : steps;
    direct_steps<Layout, Tiles, Tokens, kApart>(tiles, begin, end, x, invalid, sums);
  }
  std::uint32_t any = 0;
#pragma GCC unroll 2
  for (int t = 0; t < Tiles; ++t) any |= Layout::any(invalid[t]);
  return any;
}

// Calls direct_tiles for two tiles, or for one where there is one, or one token: memory decides then, and serves one
// stream best.
template <class Layout, int Tokens = kDirectTokens>
std::uint32_t direct(const std::uint8_t* bytes, std::int64_t payload_row_bytes, std::int64_t rows, std::int64_t steps,
                     const void* packed_tokens, std::int64_t tokens, void* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return direct<Layout, Tokens - 1>(bytes, payload_row_bytes, rows, steps, packed_tokens, tokens, sums);
    }
  }
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  auto* out = static_cast<std::int32_t*>(sums);
  const std::int64_t first_rows = rows < kTileRows ? rows : kTileRows;
  const std::int64_t second_rows = rows - first_rows;
  const Tile first = {bytes, first_rows * 4, row_mask(first_rows)};
  const Tile second = {bytes + kTileRows * payload_row_bytes, second_rows * 4, row_mask(second_rows)};
  if (Tokens > 1 && second_rows > 0) return direct_tiles<Layout, 2, Tokens>({first, second}, steps, x, out);
  std::uint32_t invalid = direct_tiles<Layout, 1, Tokens>({first}, steps, x, out);
  if (second_rows > 0) invalid |= direct_tiles<Layout, 1, Tokens>({second}, steps, x, out + kTileRows);
  return invalid;
}

constexpr TileFunctions avx512_tiles() {
  return {
      .activation_dtype = ActivationDtype::int8,
      .panel_rows = kRows,
      .token_tile = kTokens,
      .k_block = kBlock,
      .direct_tokens = kDirectTokens,
      .panel_element = 1,
      .token_element = 1,
      .offset_codes = true,
      .absmax = absmax_bits,
      .quantize = quantize_x_row,
      .pack_tokens = pack_token_words,
      .unpack_panel = unpack_panel<TwoBit>,
      .gemm = gemm,
      .direct = direct<TwoBit>,
      .store = store_sums<std::int32_t>,
      .direct_rows = kRows,
#ifdef __AVX512VBMI__
      .base3_unpack_panel = unpack_panel<Base3>,
      .base3_direct = direct<Base3>,
#endif
      .base3_recode = recode_base3,
  };
}

}  // namespace
}  // namespace bitcore
