// int8 activations with AVX-512 VNNI: vpdpbusd multiplies 64 codes by 64 activations and adds groups of four.
//
// Packer: standard form. CPU features: AVX-512 F, BW, DQ, VL, VNNI; where the including file is compiled for VBMI as
// well, functions for the 1.6-bit layout. A 64-byte step of a full tile is one register with an output row in each
// 32-bit lane, so that no sum crosses lanes. The code w + 1 is the unsigned operand;
// Activation::offset, added to every sum, takes the 1 off again.
//
// Packed weights are multiplied as they are, a tile of 16 rows with up to 24 tokens at a time, whatever their number:
// masks and shifts run on the pipes that vpdpbusd leaves free, so that unpacking first would only cost memory accesses.
// Tokens: [k / 4][token] words of four activations.
//
// In an unnamed namespace for the reason given in float_types-inl.h.
#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <type_traits>
#include <utility>

#include "bitcore/kernels/base3_recode-inl.h"
#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/int8_words-inl.h"
#include "bitcore/kernels/store-inl.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"

namespace bitcore {
namespace {

// Registers of sums; the others hold weights, masks and broadcasts.
constexpr int kTokens = 24;
// Steps after which sums of scaled codes are folded. Of those at 2 bits the largest, worth 64 times its value, reaches
// 64 * 2 * 128 * 4 * steps, below 2^31 up to 32,767 steps; at 1.6 bits, worth 81 times its value, up to 25,890.
constexpr std::int64_t kFoldSteps = 16384;
// How far ahead of the weights being multiplied the next ones are fetched: beyond the page, where the hardware's own
// prefetching stops.
constexpr std::int64_t kPrefetchBytes = 4096;

// acc += codes * the four activations of a word, in every lane. In assembly so that the broadcast stays in the
// instruction: GCC 12 keeps a register for a word that several tiles are multiplied with, and spills sums for it.
void multiply_add(__m512i& acc, __m512i codes, const std::uint8_t* activations) {
  const auto* word = reinterpret_cast<const std::uint8_t(*)[4]>(activations);
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*word));
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

// ---- one tile of packed weights times the activations of some tokens -----------------------------------------------

// A sum waits for the one before it: where a token alone has few, each of its groups of k has a sum of its own, of
// codes that need no shift; or every other group.
template <class Layout>
constexpr bool scaled_sums(int tokens) {
  return tokens < Layout::kGroups;
}
template <class Layout>
constexpr int sums_of_token(int tokens) {
  if (scaled_sums<Layout>(tokens)) return Layout::kGroups;
  return tokens <= 2 * Layout::kGroups ? 2 : 1;
}

// Indices are template arguments throughout: an array that a loop indexes, GCC 12 keeps in memory.
template <class Layout, int Tokens>
using Sums = __m512i[Tokens][sums_of_token<Layout>(Tokens)];

// acc += the codes of a group of k times the activations of every token.
template <class Layout, int Group, int... Token>
[[gnu::always_inline]] inline void multiply_group(Sums<Layout, sizeof...(Token)>& acc,
                                                  const typename Layout::Words& words, const std::uint8_t* x,
                                                  std::integer_sequence<int, Token...>) {
  constexpr int kCount = sizeof...(Token);
  constexpr int kSum = Group % sums_of_token<Layout>(kCount);
  __m512i codes;
  if constexpr (scaled_sums<Layout>(kCount)) {
    codes = Layout::template scaled_codes<Group>(words);
  } else {
    codes = Layout::template codes<Group>(words);
  }
  (multiply_add(acc[Token][kSum], codes, x + 4 * (Group * kCount + Token)), ...);
}

template <class Layout, int... Group, int... Token>
[[gnu::always_inline]] inline void multiply_groups(Sums<Layout, sizeof...(Token)>& acc,
                                                   const typename Layout::Words& words, const std::uint8_t* x,
                                                   std::integer_sequence<int, Group...>,
                                                   std::integer_sequence<int, Token...> tokens) {
  (multiply_group<Layout, Group>(acc, words, x, tokens), ...);
}

template <class Layout, int... Token>
[[gnu::always_inline]] inline void multiply_step(Sums<Layout, sizeof...(Token)>& acc,
                                                 const typename Layout::Words& words, const std::uint8_t* x,
                                                 std::integer_sequence<int, Token...> tokens) {
  multiply_groups<Layout>(acc, words, x, std::make_integer_sequence<int, Layout::kGroups>(), tokens);
}

template <int... Sum>
[[gnu::always_inline]] inline void start_token(__m512i (&acc)[sizeof...(Sum)], __m512i first,
                                               std::integer_sequence<int, Sum...>) {
  ((acc[Sum] = Sum == 0 ? first : _mm512_setzero_si512()), ...);
}

// Sums before the first step. The codes of the first sum of a token are never scaled.
template <class Layout, class Finish, int... Token>
[[gnu::always_inline]] inline void start(Sums<Layout, sizeof...(Token)>& acc, const Finish& finish,
                                         std::integer_sequence<int, Token...>) {
  constexpr auto kSums = std::make_integer_sequence<int, sums_of_token<Layout>(sizeof...(Token))>();
  (start_token(acc[Token], finish.start(Token), kSums), ...);
}

// A sum divided by what its codes were worth.
template <class Layout, int Tokens, int Sum>
__m512i unscaled(__m512i sum) {
  if constexpr (scaled_sums<Layout>(Tokens)) return Layout::template unscaled<Sum>(sum);
  return sum;
}

template <class Layout, int Tokens, int... Sum>
[[gnu::always_inline]] inline __m512i total_of_token(const __m512i (&acc)[sizeof...(Sum)],
                                                     std::integer_sequence<int, Sum...>) {
  __m512i total = _mm512_setzero_si512();
  ((total = _mm512_add_epi32(total, unscaled<Layout, Tokens, Sum>(acc[Sum]))), ...);
  return total;
}

// Calls finish.finish(token, sums) for every token, with a register of rows.
template <class Layout, class Finish, int... Token>
[[gnu::always_inline]] inline void finish_tokens(const Sums<Layout, sizeof...(Token)>& acc, const Finish& finish,
                                                 std::integer_sequence<int, Token...>) {
  constexpr int kCount = sizeof...(Token);
  constexpr auto kSums = std::make_integer_sequence<int, sums_of_token<Layout>(kCount)>();
  (finish.finish(Token, total_of_token<Layout, kCount>(acc[Token], kSums)), ...);
}

// Where the sums of steps begin and end: they are added to those of earlier steps, if there are any,
// [token][sums_stride],
struct AddToSums {
  std::int32_t* sums;
  std::int64_t sums_stride;
  bool has_earlier;

  [[gnu::always_inline]] __m512i start(int) const { return _mm512_setzero_si512(); }

  [[gnu::always_inline]] void finish(int token, __m512i total) const {
    std::int32_t* out = sums + token * sums_stride;
    const __mmask16 earlier = has_earlier ? 0xffff : 0;
    _mm512_store_si512(out, _mm512_add_epi32(_mm512_maskz_load_epi32(earlier, out), total));
  }
};

// or they are those of a group, which are scaled and added to those of earlier ones, [token][kTileRows]. They begin
// with the offset, which takes no instruction: it is loaded where a zero would be set.
struct AddGroup {
  const Activation* x;
  const float* w_scale;
  float* sums;

  [[gnu::always_inline]] __m512i start(int token) const { return _mm512_set1_epi32(x[token].offset); }

  [[gnu::always_inline]] void finish(int token, __m512i total) const {
    using Registers = GroupSums<sizeof(__m512i)>;
    float* out = sums;
    asm("" : "+r"(out));  // hides that the last group wrote there: GCC 12 kept a copy of every sum on the stack
    Registers::add(std::bit_cast<Registers::Ints>(total), {x[token].scale, 0}, w_scale, out + token * kTileRows);
  }
};

// Steps [begin, end) of a tile of `rows` rows. Returns what Layout::collect gathered.
template <class Layout, class Finish, int... Token>
[[gnu::always_inline]] inline __m512i multiply_steps(const std::uint8_t* tile, std::int64_t rows, std::int64_t begin,
                                                     std::int64_t end, const std::uint8_t* x, const Finish& finish,
                                                     std::integer_sequence<int, Token...> tokens) {
  constexpr int kCount = sizeof...(Token);
  const __mmask16 mask = row_mask(rows);
  __m512i invalid = _mm512_setzero_si512();
  Sums<Layout, kCount> acc;
  start<Layout>(acc, finish, tokens);
  std::int64_t step = begin;
  do {
    const std::uint8_t* bytes = tile + step * rows * 4;
    _mm_prefetch(reinterpret_cast<const char*>(bytes + kPrefetchBytes), _MM_HINT_T0);
    const typename Layout::Words words = Layout::load(bytes, mask);
    invalid = Layout::collect(invalid, words);
    multiply_step<Layout>(acc, words, x + step * 4 * Layout::kGroups * kCount, tokens);
  } while (++step < end);
  finish_tokens<Layout>(acc, finish, tokens);
  return invalid;
}

// Calls multiply_steps for this number of tokens.
template <class Layout, int Tokens = kTokens>
std::uint32_t direct(const std::uint8_t* tile, std::int64_t rows, std::int64_t steps, const void* packed_tokens,
                     std::int64_t tokens, const Groups* groups, void* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return direct<Layout, Tokens - 1>(tile, rows, steps, packed_tokens, tokens, groups, sums);
    }
  }
  constexpr auto kEach = std::make_integer_sequence<int, Tokens>();
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  std::uint32_t invalid = 0;
  if (groups == nullptr) {
    for (std::int64_t begin = 0; begin < steps; begin += kFoldSteps) {
      const std::int64_t end = begin + kFoldSteps < steps ? begin + kFoldSteps : steps;
      const AddToSums finish = {static_cast<std::int32_t*>(sums), kTileRows, begin > 0};
      invalid |= Layout::any(multiply_steps<Layout>(tile, rows, begin, end, x, finish, kEach));
    }
  } else if constexpr (std::is_same_v<Layout, TwoBit>) {
    auto* out = static_cast<float*>(sums);
    std::memset(out, 0, Tokens * kTileRows * sizeof(float));
    __m512i found = _mm512_setzero_si512();
    const std::int64_t group_steps = groups->k / kStepCodes;
    AddGroup finish = {groups->x, groups->w_scale, out};
    for (std::int64_t begin = 0; begin < steps; begin += group_steps) {
      const std::int64_t end = begin + group_steps < steps ? begin + group_steps : steps;
      found = _mm512_or_si512(found, multiply_steps<Layout>(tile, rows, begin, end, x, finish, kEach));
      finish.x += groups->x_stride;
      finish.w_scale += kTileRows;
    }
    invalid = Layout::any(found);
  }
  return invalid;
}

// ---- few tokens, several streams of tiles ---------------------------------------------------------------------------

// Tokens whose sums of two tiles fit into the registers.
template <class Layout>
constexpr int kStreamTokens = Layout::kGroups == 4 ? 4 : 2;

// Four streams were slower with weights fetched farther ahead, two with the nearer ones.
constexpr std::int64_t stream_prefetch_bytes(int tokens) { return tokens == 1 ? 512 : 2048; }

// Steps [begin, end) of the tiles; finish: an AddToSums or AddGroup for each stream. Returns `found` with what
// Layout::collect gathered.
template <class Layout, class Finish, int... Token, int... Stream>
[[gnu::always_inline]] inline __m512i stream_steps(const std::uint8_t* const* tiles, std::int64_t begin,
                                                   std::int64_t end, const std::uint8_t* x,
                                                   const Finish (&finish)[sizeof...(Stream)], __m512i found,
                                                   std::integer_sequence<int, Token...> tokens,
                                                   std::integer_sequence<int, Stream...>) {
  constexpr int kCount = sizeof...(Token);
  Sums<Layout, kCount> acc[sizeof...(Stream)];
  (start<Layout>(acc[Stream], finish[Stream], tokens), ...);
  std::int64_t step = begin;
  do {
    const auto multiply = [&](const std::uint8_t* bytes, Sums<Layout, kCount>& sums_of_stream)
        __attribute__((always_inline)) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes + stream_prefetch_bytes(kCount)), _MM_HINT_T0);
      const typename Layout::Words words = Layout::load(bytes, row_mask(kTileRows));
      found = Layout::collect(found, words);
      multiply_step<Layout>(sums_of_stream, words, x + step * 4 * Layout::kGroups * kCount, tokens);
    };
    (multiply(tiles[Stream] + step * kTileRows * 4, acc[Stream]), ...);
  } while (++step < end);
  (finish_tokens<Layout>(acc[Stream], finish[Stream], tokens), ...);
  return found;
}

template <class Layout, int... Token, int... Stream>
std::uint32_t multiply_streams(const std::uint8_t* const* runs, std::int64_t count, std::int64_t steps,
                               const std::uint8_t* x, std::int32_t* sums, std::int64_t sums_stride,
                               std::integer_sequence<int, Token...> tokens,
                               std::integer_sequence<int, Stream...> streams) {
  constexpr std::int64_t kCount = sizeof...(Token);
  __m512i found = _mm512_setzero_si512();
  for (std::int64_t tile = 0; tile < count; ++tile) {
    const std::uint8_t* tiles[] = {runs[Stream] + tile * steps * kTileRows * 4 ...};
    for (std::int64_t begin = 0; begin < steps; begin += kFoldSteps) {
      const std::int64_t end = begin + kFoldSteps < steps ? begin + kFoldSteps : steps;
      const AddToSums finish[] = {{sums + tile * kTileRows + Stream * kCount * sums_stride, sums_stride, begin > 0}...};
      found = stream_steps<Layout>(tiles, begin, end, x, finish, found, tokens, streams);
    }
  }
  return Layout::any(found);
}

// One tile of each run, with a scale for each group of k.
template <int... Token, int... Stream>
std::uint32_t multiply_grouped_streams(const std::uint8_t* const* tiles, std::int64_t steps, const std::uint8_t* x,
                                       const Groups& groups, float* sums, std::integer_sequence<int, Token...> tokens,
                                       std::integer_sequence<int, Stream...> streams) {
  constexpr std::int64_t kSums = sizeof...(Token) * kTileRows;  // of a stream
  const std::int64_t stream_scales = (steps * kStepCodes + groups.k - 1) / groups.k * kTileRows;
  std::memset(sums, 0, sizeof...(Stream) * kSums * sizeof(float));
  __m512i found = _mm512_setzero_si512();
  const std::int64_t group_steps = groups.k / kStepCodes;
  const Activation* activations = groups.x;
  const float* w_scale = groups.w_scale;
  for (std::int64_t begin = 0; begin < steps; begin += group_steps) {
    const std::int64_t end = begin + group_steps < steps ? begin + group_steps : steps;
    const AddGroup finish[] = {{activations, w_scale + Stream * stream_scales, sums + Stream * kSums}...};
    found = stream_steps<TwoBit>(tiles, begin, end, x, finish, found, tokens, streams);
    activations += groups.x_stride;
    w_scale += kTileRows;
  }
  return TwoBit::any(found);
}

// Calls multiply_streams for this number of tokens.
template <class Layout, int Tokens = kStreamTokens<Layout>>
std::uint32_t direct_streams(const std::uint8_t* const* runs, std::int64_t count, std::int64_t steps,
                             const void* packed_tokens, std::int64_t tokens, const Groups* groups, void* sums,
                             std::int64_t sums_stride) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return direct_streams<Layout, Tokens - 1>(runs, count, steps, packed_tokens, tokens, groups, sums, sums_stride);
    }
  }
  constexpr auto kEach = std::make_integer_sequence<int, Tokens>();
  constexpr auto kStreams = std::make_integer_sequence<int, static_cast<int>(streams_of(Tokens))>();
  const auto* x = static_cast<const std::uint8_t*>(packed_tokens);
  if constexpr (std::is_same_v<Layout, TwoBit>) {
    if (groups != nullptr) {
      return multiply_grouped_streams(runs, steps, x, *groups, static_cast<float*>(sums), kEach, kStreams);
    }
  }
  return multiply_streams<Layout>(runs, count, steps, x, static_cast<std::int32_t*>(sums), sums_stride, kEach,
                                  kStreams);
}

constexpr TileFunctions avx512_tiles() {
  return {
      .activation_dtype = ActivationDtype::int8,
      .token_element = 1,
      .offset_codes = true,
      .pack_tokens = pack_token_words,
      .store = store_sums<std::int32_t>,
      .direct_tokens = kTokens,
      .two_bit = {.direct = direct<TwoBit>,
                  .stream_tokens = kStreamTokens<TwoBit>,
                  .direct_streams = direct_streams<TwoBit>},
#ifdef __AVX512VBMI__
      .base3 = {.direct = direct<Base3>,
                .stream_tokens = kStreamTokens<Base3>,
                .direct_streams = direct_streams<Base3>},
#endif
      .base3_recode = recode_base3,
  };
}

}  // namespace
}  // namespace bitcore
