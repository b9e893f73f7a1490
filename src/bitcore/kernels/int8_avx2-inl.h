// int8 kernels with 256-bit registers: everything but the multiply-add, which the including file brings.
//
// Packer: standard form, both layouts. CPU features: AVX2, FMA. Half a step of a full tile is one register with an
// output row in each 32-bit lane, so that no sum crosses lanes. The code w + 1 is the unsigned operand; store
// takes the sum of a token's activations off every sum, which takes the 1 off again.
//
// Panel: [k / 4][16 rows] words of four codes; tokens: [k / 4][token] words of four activations.
//
// `Arithmetic` is a struct of static members that says how products of codes and activations are added up:
//   multiply_add(sums, codes, activations)  sums += codes * activations, in the lanes of the including file
//   rows(sums)                              the int32 sum of each output row
//   kFoldGroups                             groups of four k, codes up to 2, that sums hold
//   kDirectTokens                           TileFunctions::direct_tokens
//   direct_sums(tokens)                     registers of sums of each token and half of a tile in direct: 1 or 2
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <iterator>
#include <type_traits>
#include <utility>

#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/int8_words-inl.h"
#include "bitcore/kernels/store-inl.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"

namespace bitcore {
namespace {

constexpr std::int64_t kRows = kTileRows;
constexpr int kLanes = 8;
constexpr int kHalves = 2;  // registers of a tile
// 6 tokens x 2 registers of sums, 2 of weights, one broadcast and one product: all 16 registers.
constexpr int kTokens = 6;
// 16 rows x 1,024 bytes = 16 KiB of weights and 6 x 1,024 = 6 KiB of activations share an L1 cache of 32 KiB.
constexpr std::int64_t kBlock = 1024;
// How far ahead of the weights being multiplied the next ones are fetched: beyond the page, where the hardware's own
// prefetching stops.
constexpr std::int64_t kPrefetchBytes = 4096;

__m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

__m256i broadcast_word(const void* activations) {
  std::int32_t word;
  std::memcpy(&word, activations, sizeof(word));
  return _mm256_set1_epi32(word);
}

void prefetch(const std::uint8_t* bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(bytes + kPrefetchBytes), _MM_HINT_T0);
}

// All bits of the lanes of one half of a tile that hold rows.
__m256i lane_mask(std::int64_t rows, int half) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows) - half * kLanes), lanes);
}

// ---- the layouts ---------------------------------------------------------------------------------------------------

__m256i low_fields() { return _mm256_set1_epi8(0x03); }

// 2 bits: the four fields of a byte are the codes of four groups of k.
struct TwoBit {
  static constexpr int kGroups = 4;
  using Words = __m256i;

  static Words split(__m256i bytes) { return bytes; }

  // ORs codes that are 3 into `invalid`; bits between the fields are noise until any() drops them.
  static __m256i collect(__m256i invalid, const Words& words) {
    return _mm256_or_si256(invalid, _mm256_and_si256(words, _mm256_srli_epi32(words, 1)));
  }
  static std::uint32_t any(__m256i invalid, __m256i lanes) {
    return _mm256_testz_si256(invalid, _mm256_and_si256(lanes, _mm256_set1_epi32(0x55555555))) ? 0u : 1u;
  }

  template <int Group>
  static __m256i codes(const Words& words) {
    return _mm256_and_si256(Group == 0 ? words : _mm256_srli_epi32(words, 2 * Group), low_fields());
  }

  // Codes worth 2^scale_bits(Group) times their value: one shift instead of three for the four groups.
  static constexpr int scale_bits(int group) { return group % 2 == 0 ? 0 : 2; }
  template <int Group>
  static __m256i scaled_codes(const Words& words) {
    const __m256i nibbles = Group < 2 ? words : _mm256_srli_epi32(words, 4);
    return _mm256_and_si256(nibbles, _mm256_set1_epi8(static_cast<char>(0x03 << scale_bits(Group))));
  }
};

using Table = std::array<std::uint8_t, 16>;

// The values of entry(0) to entry(15).
template <class Entry>
constexpr Table make_table(Entry entry) {
  Table table{};
  for (int i = 0; i < 16; ++i) table[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(entry(i));
  return table;
}

// The entry that the low four bits of each byte name; the top bit of a byte is 0.
__m256i look_up(const Table& table, __m256i bytes) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.data()));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), bytes);
}

// 1.6 bits: the five digits of a byte in base 3 are the codes of five groups of k. Two rounds of b = min(b, b - 81) on
// unsigned bytes peel the top digit off. The rest, below 81, is 9 h + l, with two digits in each of h and l.
struct Base3 {
  static constexpr int kGroups = 5;
  // The multiple of nine in (8 i - 9, 8 i]: taken off a rest from 8 i to 8 i + 7 it leaves 0 to 15.
  static constexpr Table kNines = make_table([](int i) { return 8 * i / 9 * 9; });
  static constexpr Table kMod9 = make_table([](int i) { return i % 9; });
  static constexpr Table kDigit0 = make_table([](int i) { return i % 9 % 3; });
  static constexpr Table kDigit1 = make_table([](int i) { return i % 9 / 3; });
  // Of the low four bits of 9 h, which differ for each h; 9 * 9 is 1 modulo 16.
  static constexpr Table kDigit2 = make_table([](int i) { return 9 * i % 16 % 3; });
  static constexpr Table kDigit3 = make_table([](int i) { return 9 * i % 16 / 3; });

  struct Words {
    __m256i bytes;
    __m256i low;    // l, or l + 9 where that is below 16
    __m256i nines;  // 9 h
    __m256i top;    // 81 times the top digit
  };

  static Words split(__m256i bytes) {
    const __m256i place = _mm256_set1_epi8(81);
    const __m256i once = _mm256_min_epu8(bytes, _mm256_sub_epi8(bytes, place));
    const __m256i rest = _mm256_min_epu8(once, _mm256_sub_epi8(once, place));
    const __m256i eighth = _mm256_and_si256(_mm256_srli_epi16(rest, 3), _mm256_set1_epi8(0x0f));
    const __m256i low = _mm256_sub_epi8(rest, look_up(kNines, eighth));
    return {bytes, low, _mm256_sub_epi8(rest, look_up(kMod9, low)), _mm256_sub_epi8(bytes, rest)};
  }

  static __m256i collect(__m256i largest, const Words& words) { return _mm256_max_epu8(largest, words.bytes); }
  static std::uint32_t any(__m256i largest, __m256i lanes) {
    const __m256i most = _mm256_set1_epi8(static_cast<char>(kMostBase3Byte));
    return _mm256_testz_si256(_mm256_subs_epu8(largest, most), lanes) ? 0u : 1u;
  }

  // 81 and 162 have 1 and 2 in their lowest two bits.
  template <int Group>
  static __m256i codes(const Words& words) {
    if constexpr (Group == 4) return _mm256_and_si256(words.top, low_fields());
    if constexpr (Group >= 2) return look_up(Group == 2 ? kDigit2 : kDigit3, words.nines);
    return look_up(Group == 0 ? kDigit0 : kDigit1, words.low);
  }

  static constexpr int scale_bits(int) { return 0; }
  template <int Group>
  static __m256i scaled_codes(const Words& words) {
    return codes<Group>(words);
  }
};

// One half of a step. Where the tile has fewer than 16 rows the other lanes read what follows, in the end the trailer,
// which is long enough: their sums are never stored, their invalid codes are masked. (Masked loads would be exact, but
// ran at a quarter of the speed from memory.)
template <class Layout>
typename Layout::Words load_half(const std::uint8_t* step, int half) {
  return Layout::split(load(step + half * kLanes * 4));
}

// What the two registers of sums of one token and one tile go to: those of earlier k, [token][row],
struct AddToSums {
  std::int32_t* sums;

  [[gnu::always_inline]] void operator()(int token, __m256i first, __m256i second) const {
    auto* lanes = reinterpret_cast<__m256i*>(sums + token * kRows);
    _mm256_store_si256(lanes, _mm256_add_epi32(_mm256_load_si256(lanes), first));
    _mm256_store_si256(lanes + 1, _mm256_add_epi32(_mm256_load_si256(lanes + 1), second));
  }
};

// or, scaled, the sums of all groups of k before it.
struct AddGroup {
  const Activation* x;
  const float* w_scale;
  float* sums;

  [[gnu::always_inline]] void operator()(int token, __m256i first, __m256i second) const {
    using Registers = GroupSums<sizeof(__m256i)>;
    const Activation activation = x[token];  // once: the compiler takes sums for a place where it may lie
    Registers::add(std::bit_cast<Registers::Ints>(first), activation, w_scale, sums + token * kRows);
    Registers::add(std::bit_cast<Registers::Ints>(second), activation, w_scale + kLanes, sums + token * kRows + kLanes);
  }

  void next(const Groups& groups) {
    x += groups.x_stride;
    w_scale += kRows;
  }
};

// ---- many tokens ---------------------------------------------------------------------------------------------------

template <class Layout, int... Group>
void store_groups(const typename Layout::Words& words, __m256i* panel, std::integer_sequence<int, Group...>) {
  (_mm256_store_si256(panel + Group * kHalves, Layout::template codes<Group>(words)), ...);
}

template <class Layout>
std::uint32_t unpack_panel(const std::uint8_t* tiles, std::int64_t, std::int64_t rows, std::int64_t step_begin,
                           std::int64_t step_end, void* panel) {
  constexpr auto kEach = std::make_integer_sequence<int, Layout::kGroups>();
  auto* out = static_cast<__m256i*>(panel);
  __m256i invalid[kHalves] = {};
  for (std::int64_t step = step_begin; step < step_end; ++step, out += Layout::kGroups * kHalves) {
    const std::uint8_t* bytes = tiles + step * rows * 4;
    prefetch(bytes);
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const typename Layout::Words words = load_half<Layout>(bytes, half);
      invalid[half] = Layout::collect(invalid[half], words);
      store_groups<Layout>(words, out + half, kEach);
    }
  }
  return Layout::any(invalid[0], lane_mask(rows, 0)) | Layout::any(invalid[1], lane_mask(rows, 1));
}

// At most Arithmetic::kFoldGroups groups of four k. Calls finish(token, sums, sums) with two registers of rows.
template <class Arithmetic, int Tokens, class Finish>
[[gnu::always_inline]] inline void gemm_groups(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t groups,
                                               const Finish& finish) {
  __m256i acc[Tokens][kHalves];
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (std::int64_t group = 0; group < groups; ++group, weights += kRows * 4, x += Tokens * 4) {
    const __m256i first = load(weights);
    const __m256i second = load(weights + kLanes * 4);
#pragma GCC unroll 6
    for (int m = 0; m < Tokens; ++m) {
      const __m256i activations = broadcast_word(x + 4 * m);
      Arithmetic::multiply_add(acc[m][0], first, activations);
      Arithmetic::multiply_add(acc[m][1], second, activations);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < Tokens; ++m) finish(m, Arithmetic::rows(acc[m][0]), Arithmetic::rows(acc[m][1]));
}

// Any number of k.
template <class Arithmetic, int Tokens>
void gemm_all(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t k_count, std::int32_t* sums) {
  constexpr std::int64_t kFoldGroups = Arithmetic::kFoldGroups;
  const std::int64_t groups = k_count / 4;
  for (std::int64_t group = 0; group < groups; group += kFoldGroups) {
    const std::int64_t count = groups - group < kFoldGroups ? groups - group : kFoldGroups;
    gemm_groups<Arithmetic, Tokens>(weights + group * kRows * 4, x + group * Tokens * 4, count, AddToSums{sums});
  }
}

// With a scale for each group of k, whose sums fit into int16.
template <class Arithmetic, int Tokens>
void gemm_grouped(const std::uint8_t* weights, const std::uint8_t* x, std::int64_t k_count, const Groups& groups,
                  float* sums) {
  static_assert(4 * Arithmetic::kFoldGroups >= *std::max_element(std::begin(kGroupSizes), std::end(kGroupSizes)));
  AddGroup finish = {groups.x, groups.w_scale, sums};
  for (std::int64_t k = 0; k < k_count; k += groups.k) {
    const std::int64_t count = groups.k < k_count - k ? groups.k : k_count - k;
    gemm_groups<Arithmetic, Tokens>(weights + k * kRows, x + k * Tokens, count / 4, finish);
    finish.next(groups);
  }
}

// Calls gemm_all<tokens> or gemm_grouped<tokens>.
template <class Arithmetic, int Tokens = kTokens>
void gemm(const void* panel, const void* packed_tokens, std::int64_t tokens, std::int64_t k_count, const Groups* groups,
          void* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return gemm<Arithmetic, Tokens - 1>(panel, packed_tokens, tokens, k_count, groups, sums);
  }
  const auto* weights = static_cast<const std::uint8_t*>(panel);
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  if (groups == nullptr) return gemm_all<Arithmetic, Tokens>(weights, x, k_count, static_cast<std::int32_t*>(sums));
  gemm_grouped<Arithmetic, Tokens>(weights, x, k_count, *groups, static_cast<float*>(sums));
}

// ---- few tokens ----------------------------------------------------------------------------------------------------

// Indices of sums are template arguments: an array that a loop indexes, GCC 12 keeps in memory.
template <int Tokens, int Sums>
using DirectSums = __m256i[Tokens][kHalves][Sums];

template <int Tokens>
constexpr auto kEachToken = std::make_integer_sequence<int, Tokens>();

// Codes of one group of k of half of a tile; for several registers of sums they may be worth more than their value.
template <class Layout, int Group, int Sums>
[[gnu::always_inline]] inline __m256i direct_codes(const typename Layout::Words& words) {
  if constexpr (Sums > 1) return Layout::template scaled_codes<Group>(words);
  return Layout::template codes<Group>(words);
}

template <class Arithmetic, int Sum, int Sums>
[[gnu::always_inline]] inline void multiply_token(__m256i (&acc)[kHalves][Sums], __m256i first, __m256i second,
                                                  __m256i activations) {
  Arithmetic::multiply_add(acc[0][Sum], first, activations);
  Arithmetic::multiply_add(acc[1][Sum], second, activations);
}

// acc += the codes of one group of k, times all tokens. Neighbouring groups use different registers of sums.
template <class Arithmetic, class Layout, int Group, int Tokens, int Sums, int... Token>
[[gnu::always_inline]] inline void multiply_group(DirectSums<Tokens, Sums>& acc,
                                                  const typename Layout::Words (&words)[kHalves], const std::uint8_t* x,
                                                  std::integer_sequence<int, Token...>) {
  const __m256i first = direct_codes<Layout, Group, Sums>(words[0]);
  const __m256i second = direct_codes<Layout, Group, Sums>(words[1]);
  (multiply_token<Arithmetic, Group % Sums>(acc[Token], first, second,
                                            broadcast_word(x + 4 * (Group * Tokens + Token))),
   ...);
}

template <class Arithmetic, class Layout, int Tokens, int Sums, int... Group>
[[gnu::always_inline]] inline void multiply_groups(DirectSums<Tokens, Sums>& acc,
                                                   const typename Layout::Words (&words)[kHalves],
                                                   const std::uint8_t* x, std::integer_sequence<int, Group...>) {
  (multiply_group<Arithmetic, Layout, Group, Tokens, Sums>(acc, words, x, kEachToken<Tokens>), ...);
}

// The sum over all registers of sums, each divided by what its codes are worth.
template <class Arithmetic, class Layout, int... Sum>
[[gnu::always_inline]] inline __m256i total_rows(const __m256i (&acc)[sizeof...(Sum)],
                                                 std::integer_sequence<int, Sum...>) {
  __m256i total = _mm256_setzero_si256();
  ((total = _mm256_add_epi32(total, Sum == 0 ? Arithmetic::rows(acc[Sum])
                                             : _mm256_srai_epi32(Arithmetic::rows(acc[Sum]), Layout::scale_bits(Sum)))),
   ...);
  return total;
}

template <class Arithmetic, class Layout, int Sums, class Finish, int... Token>
[[gnu::always_inline]] inline void finish_tokens(const DirectSums<sizeof...(Token), Sums>& acc, const Finish& finish,
                                                 std::integer_sequence<int, Token...>) {
  constexpr auto kEachSum = std::make_integer_sequence<int, Sums>();
  (finish(Token, total_rows<Arithmetic, Layout>(acc[Token][0], kEachSum),
          total_rows<Arithmetic, Layout>(acc[Token][1], kEachSum)),
   ...);
}

template <int... Sum>
[[gnu::always_inline]] inline void clear_half(__m256i (&acc)[sizeof...(Sum)], std::integer_sequence<int, Sum...>) {
  ((acc[Sum] = _mm256_setzero_si256()), ...);
}

template <int Sums, int... Token>
[[gnu::always_inline]] inline void clear(DirectSums<sizeof...(Token), Sums>& acc,
                                         std::integer_sequence<int, Token...>) {
  constexpr auto kEachSum = std::make_integer_sequence<int, Sums>();
  ((clear_half(acc[Token][0], kEachSum), clear_half(acc[Token][1], kEachSum)), ...);
}

// Steps after which sums are full: a register gets the codes of every Sums-th group.
template <class Arithmetic, class Layout, int Sums>
constexpr std::int64_t fold_steps() {
  static_assert(Sums == 1 || Sums % 2 == 0, "codes of one register are worth the same");
  const int scale = Sums > 1 ? 1 << Layout::scale_bits(1) : 1;
  const int groups = (Layout::kGroups + Sums - 1) / Sums;
  return Arithmetic::kFoldGroups / (groups * scale);
}

// At most fold_steps() steps of a tile times all tokens. Calls finish(token, sums, sums) with two registers of rows.
template <class Arithmetic, class Layout, int Tokens, class Finish>
[[gnu::always_inline]] inline void direct_steps(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps,
                                                const std::uint8_t* x, __m256i (&invalid)[kHalves],
                                                const Finish& finish) {
  constexpr auto kEach = std::make_integer_sequence<int, Layout::kGroups>();
  constexpr int kSums = Arithmetic::direct_sums(Tokens);
  DirectSums<Tokens, kSums> acc;
  clear<kSums>(acc, kEachToken<Tokens>);
  __m256i found[kHalves] = {invalid[0], invalid[1]};
#pragma GCC unroll 2
  for (std::int64_t step = 0; step < steps; ++step, tile += rows * 4, x += 4 * Layout::kGroups * Tokens) {
    // With one or two tokens memory is the limit and the hardware's prefetching suffices: more would be in its way.
    if constexpr (Tokens > 2) prefetch(tile);
    const typename Layout::Words words[kHalves] = {load_half<Layout>(tile, 0), load_half<Layout>(tile, 1)};
    found[0] = Layout::collect(found[0], words[0]);
    found[1] = Layout::collect(found[1], words[1]);
    multiply_groups<Arithmetic, Layout, Tokens, kSums>(acc, words, x, kEach);
  }
  invalid[0] = found[0];
  invalid[1] = found[1];
  finish_tokens<Arithmetic, Layout, kSums>(acc, finish, kEachToken<Tokens>);
}

// Any number of steps, added to `sums`.
template <class Arithmetic, class Layout, int Tokens>
void direct_all(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const std::uint8_t* x,
                __m256i (&invalid)[kHalves], std::int32_t* sums) {
  constexpr std::int64_t kFoldSteps = fold_steps<Arithmetic, Layout, Arithmetic::direct_sums(Tokens)>();
  for (std::int64_t begin = 0; begin < steps; begin += kFoldSteps) {
    const std::int64_t count = steps - begin < kFoldSteps ? steps - begin : kFoldSteps;
    direct_steps<Arithmetic, Layout, Tokens>(tile + begin * rows * 4, rows, count,
                                             x + begin * 4 * Layout::kGroups * Tokens, invalid, AddToSums{sums});
  }
}

// With a scale for each group of k.
template <class Arithmetic, int Tokens>
[[gnu::noinline]] void direct_grouped(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps,
                                      const std::uint8_t* x, const Groups& groups, __m256i (&invalid)[kHalves],
                                      float* sums) {
  constexpr std::int64_t kFoldSteps = fold_steps<Arithmetic, TwoBit, Arithmetic::direct_sums(Tokens)>();
  if (groups.k > kFoldSteps * kStepCodes) {
    return multiply_by_groups<kRows, Tokens, std::int32_t>(
        &groups, Tokens, steps * kStepCodes, sums, [&](std::int64_t k, std::int64_t count, std::int32_t* group) {
          direct_all<Arithmetic, TwoBit, Tokens>(tile + k / kStepCodes * rows * 4, rows, count / kStepCodes,
                                                 x + k * Tokens, invalid, group);
        });
  }
  AddGroup finish = {groups.x, groups.w_scale, sums};
  __m256i found[kHalves] = {invalid[0], invalid[1]};
  const std::int64_t group_steps = groups.k / kStepCodes;
  for (std::int64_t step = 0; step < steps; step += group_steps) {
    const std::int64_t count = group_steps < steps - step ? group_steps : steps - step;
    direct_steps<Arithmetic, TwoBit, Tokens>(tile + step * rows * 4, rows, count, x + step * kStepCodes * Tokens, found,
                                             finish);
    finish.next(groups);
  }
  invalid[0] = found[0];
  invalid[1] = found[1];
}

// Calls direct_all<tokens> or direct_grouped<tokens>.
template <class Arithmetic, class Layout, int Tokens = Arithmetic::kDirectTokens>
std::uint32_t direct(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const void* packed_tokens,
                     std::int64_t tokens, const Groups* groups, void* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return direct<Arithmetic, Layout, Tokens - 1>(tile, rows, steps, packed_tokens, tokens, groups, sums);
    }
  }
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  std::memset(sums, 0, Tokens * kRows * sizeof(std::int32_t));
  __m256i invalid[kHalves] = {};
  if (groups == nullptr) {
    direct_all<Arithmetic, Layout, Tokens>(tile, rows, steps, x, invalid, static_cast<std::int32_t*>(sums));
  } else if constexpr (std::is_same_v<Layout, TwoBit>) {
    direct_grouped<Arithmetic, Tokens>(tile, rows, steps, x, *groups, invalid, static_cast<float*>(sums));
  }
  return Layout::any(invalid[0], lane_mask(rows, 0)) | Layout::any(invalid[1], lane_mask(rows, 1));
}

template <class Arithmetic>
constexpr TileFunctions avx2_tiles() {
  return {
      .activation_dtype = ActivationDtype::int8,
      .token_element = 1,
      .offset_codes = true,
      .pack_tokens = pack_token_words,
      .store = store_sums<std::int32_t>,
      .direct_tokens = Arithmetic::kDirectTokens,
      .panels = {.rows = kRows, .token_tile = kTokens, .k_block = kBlock, .element = 1, .gemm = gemm<Arithmetic>},
      .two_bit = {.unpack_panel = unpack_panel<TwoBit>, .direct = direct<Arithmetic, TwoBit>},
      .base3 = {.unpack_panel = unpack_panel<Base3>, .direct = direct<Arithmetic, Base3>},
  };
}

}  // namespace
}  // namespace bitcore
