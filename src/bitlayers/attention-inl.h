// Attention of queries to one block of the cache, in the order of rounding that docs/contract.md fixes.
//
// The queries are taken in tiles of kTileQueries. For each: all scores, sixteen lanes per (query, key) pair; the
// softmax of each query, lanes over the keys; then the weighted sum of the values, lanes over head_dim. Within a tile
// the loops are blocked for registers. Keys and values are widened to float32 in the register that multiplies them, or,
// for many queries, once for all of them into scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bitcore/quantize/quantize-inl.h"
#include "bitlayers/attention_function_tables.h"
#include "bitlayers/attention_functions.h"
#include "bitlayers/exp-inl.h"
#include "bitlayers/map-inl.h"
#include "bitlayers/vector-inl.h"

namespace bitlayers {
namespace {

// Positions that all queries of a tile read before the next ones: as many as stay in an L1 cache.
inline constexpr std::int64_t kKeyPositions = 16;  // a multiple of every register tile's keys
inline constexpr std::int64_t kValuePositions = 32;

// Fewer queries than these do not pay for storing what was widened.
inline constexpr std::int64_t kWideningQueries = 5;

// Register blocking: Floats that sum at a time (of 32 registers of 16 floats, 16 of 8, 32 of 4) and, of these, how many
// belong to different queries. The others belong to different keys, or to different columns of the values.
#if defined(__AVX512F__)
inline constexpr int kSums = 16;
inline constexpr int kScoreQueries = 4;
#else
inline constexpr int kSums = 4;
inline constexpr int kScoreQueries = 2;
#endif
inline constexpr int kValueQueries = 4;

// ---- elements of the cache ----

[[gnu::always_inline]] inline Floats load_wide(const float* p) { return load(p); }
[[gnu::always_inline]] inline Floats load_wide(const std::uint16_t* p) { return load_float16(p); }
[[gnu::always_inline]] inline Floats load_wide(const std::int8_t* p) { return load_int8(p); }

// Sixteen elements of a row.
struct Whole {
  template <class Element>
  [[gnu::always_inline]] Floats load(const Element* p) const {
    return load_wide(p);
  }
  [[gnu::always_inline]] void store(float* p, const Floats& a) const { bitlayers::store(p, a); }
  [[gnu::always_inline]] Floats present(const Floats& a, const Floats& /*absent*/) const { return a; }
};

// The last `count` < 16 of a row; the other lanes are 0.
struct First {
  std::int64_t count;
  template <class Element>
  Floats load(const Element* p) const {
    Element sixteen[kLanes];
    copy_first(p, count, sixteen);
    return load_wide(sixteen);
  }
  void store(float* p, const Floats& a) const { store_first(p, count, a); }
  /// a in the lanes that have an element, `absent` in the others.
  Floats present(const Floats& a, const Floats& absent) const { return select(first_lanes(count), a, absent); }
};

template <class Element>
inline void widen(const Element* in, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_wide(in + i));
  if (i < count) store_first(out + i, count - i, First{count - i}.load(in + i));
}

// ---- scores ----

/// out[query][key] = fold(lanes[query * keys + key]), for kQueries * keys sums.
template <int kQueries>
[[gnu::always_inline]] inline void fold_all(const Floats (&lanes)[kSums], float* const (&out)[kQueries]) {
  constexpr int kKeys = kSums / kQueries;
#if defined(__AVX512F__)
  // Each step adds the halves of two vectors into the halves of one. The order of the sixteen is such that the last
  // step leaves them as they are to be stored.
  __m512 eight[8], four[4], two[2];
  const auto sum = [&](int i) { return lanes[4 * (i % 4) + i / 4].part[0]; };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = sum(2 * i), b = sum(2 * i + 1);
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(four[2 * i]), b = _mm512_castps_pd(four[2 * i + 1]);
    two[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 one = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
  if constexpr (kKeys == 16) {
    _mm512_storeu_ps(out[0], one);
  } else if constexpr (kKeys == 8) {
    _mm256_storeu_ps(out[0], _mm512_castps512_ps256(one));
    _mm256_storeu_ps(out[1], _mm512_extractf32x8_ps(one, 1));
  } else {
    _mm_storeu_ps(out[0], _mm512_castps512_ps128(one));
    _mm_storeu_ps(out[1], _mm512_extractf32x4_ps(one, 1));
    _mm_storeu_ps(out[2], _mm512_extractf32x4_ps(one, 2));
    _mm_storeu_ps(out[3], _mm512_extractf32x4_ps(one, 3));
  }
#else
#pragma GCC unroll 4
  for (int query = 0; query < kQueries; ++query) {
#pragma GCC unroll 4
    for (int key = 0; key < kKeys; ++key) out[query][key] = fold(lanes[query * kKeys + key]);
  }
#endif
}

/// lanes[query * keys + key] = fma(q, k, lanes[...]) for sixteen columns of a row, or the last ones: a lane without an
/// element does not change.
template <int kQueries, class Piece, class Element>
[[gnu::always_inline]] inline void add_products(const float* const (&q)[kQueries],
                                                const Element* const (&keys)[kSums / kQueries], std::int64_t d,
                                                const Piece& piece, Floats (&lanes)[kSums]) {
  constexpr int kKeys = kSums / kQueries;
  Floats queries[kQueries];
#pragma GCC unroll 4
  for (int query = 0; query < kQueries; ++query) queries[query] = piece.load(q[query] + d);
#pragma GCC unroll 16
  for (int key = 0; key < kKeys; ++key) {
    const Floats wide = piece.load(keys[key] + d);
#pragma GCC unroll 4
    for (int query = 0; query < kQueries; ++query) {
      Floats& sum = lanes[query * kKeys + key];
      sum = piece.present(fma(queries[query], wide, sum), sum);
    }
  }
}

/// out[query][key] = dot(q[query], keys[key]).
template <int kQueries, class Element>
[[gnu::always_inline]] inline void dot_tile(const float* const (&q)[kQueries],
                                            const Element* const (&keys)[kSums / kQueries], std::int64_t head_dim,
                                            float* const (&out)[kQueries]) {
  Floats lanes[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) lanes[i] = all(0.0f);
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) add_products<kQueries>(q, keys, d, Whole{}, lanes);
  if (d < head_dim) add_products<kQueries>(q, keys, d, First{head_dim - d}, lanes);
  fold_all<kQueries>(lanes, out);
}

/// Some queries of a tile: the scores of query i are at scores + i * kBlockPositions.
struct Queries {
  const float* const* q;
  const std::int32_t* visible;
  float* const* output;
  float* scores;
  std::int64_t count;

  Queries some(std::int64_t first, std::int64_t most) const {
    return {q + first, visible + first, output + first, scores + first * kBlockPositions,
            std::min(most, count - first)};
  }
  std::int64_t most_visible() const {
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < count; ++i) most = std::max<std::int64_t>(most, visible[i]);
    return most;
  }
  std::int64_t least_visible() const {
    std::int64_t least = kBlockPositions;
    for (std::int64_t i = 0; i < count; ++i) least = std::min<std::int64_t>(least, visible[i]);
    return least;
  }
};

/// Rows that will come from memory next, `count` of them.
struct Following {
  const std::byte* rows = nullptr;
  std::int64_t head_dim = 0;
  std::int64_t element_bytes = 0;
  std::int64_t count = 0;

  /// Asks for columns [d, d + columns) of a row: little by little, between the multiplications, because a CPU waits for
  /// few cache lines at a time.
  [[gnu::always_inline]] void prefetch(std::int64_t row, std::int64_t d, std::int64_t columns) const {
    if (row >= count) return;
    const std::byte* begin = rows + (row * head_dim + d) * element_bytes;
    for (std::int64_t i = 0; i < columns * element_bytes; i += 64) __builtin_prefetch(begin + i);
  }
};

/// Rows of the keys or values of positions [first, last).
template <class Element>
struct Group {
  const Element* rows;
  std::int64_t head_dim;
  std::int64_t first;
  std::int64_t last;
  Following following;

  const Element* row(std::int64_t j) const { return rows + (j - first) * head_dim; }

  /// Positions [begin, end) of these, which ask for nothing.
  Group part(std::int64_t begin, std::int64_t end) const { return {row(begin), head_dim, begin, end, {}}; }
};

/// Dots of up to kQueries queries with the keys before `end`. Where there are fewer queries or keys, the last one
/// stands in: the same dot is written again, or one at a position that nobody reads.
template <int kQueries, class Element>
inline void dot_rows(const Queries& queries, const Group<Element> keys, std::int64_t end) {
  constexpr int kKeys = kSums / kQueries;
  const std::int64_t head_dim = keys.head_dim;
  const float* q[kQueries];
  float* scores[kQueries];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
    const std::int64_t query = std::min<std::int64_t>(i, queries.count - 1);
    q[i] = queries.q[query];
    scores[i] = queries.scores + query * kBlockPositions + keys.first;
  }
  const Element* row = keys.rows;
  for (std::int64_t j = keys.first; j < end; j += kKeys, row += kKeys * head_dim) {
    const Element* key[kKeys] = {row};
#pragma GCC unroll 16
    for (int i = 1; i < kKeys; ++i) key[i] = key[i - 1] + (j + i < end ? head_dim : 0);
    if (keys.following.count > 0) {
      for (int i = 0; i < kKeys; ++i) keys.following.prefetch(j + i - keys.first, 0, head_dim);
    }
    dot_tile<kQueries>(q, key, head_dim, scores);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) scores[i] += kKeys;
  }
}

/// Calls function(group) for groups of `step` positions of keys or values, one after the other: their rows as they are
/// or, if that pays, widened.
template <class Element, class Function>
inline void in_groups(const Queries& tile, const Element* rows, std::int64_t head_dim, std::int64_t step, float* wide,
                      const Function& function) {
  const std::int64_t visible = tile.most_visible();
  const bool widens =
      !std::is_same_v<Element, float> && tile.count >= kWideningQueries && step * head_dim <= kWideFloats;
  for (std::int64_t first = 0; first < visible; first += step) {
    const std::int64_t last = std::min(first + step, visible);
    const Element* group = rows + first * head_dim;
    const Following following{reinterpret_cast<const std::byte*>(rows + last * head_dim), head_dim, sizeof(Element),
                              std::min(step, visible - last)};
    if (widens) {
      widen(group, (last - first) * head_dim, wide);
      function(Group<float>{wide, head_dim, first, last, following});
    } else {
      function(Group<Element>{group, head_dim, first, last, following});
    }
  }
}

/// Dots of all queries of a tile with all keys that one of them sees.
template <class Element>
inline void dots(const Queries& tile, const Element* keys, std::int64_t head_dim, float* wide) {
  in_groups(tile, keys, head_dim, kKeyPositions, wide, [&](auto group) {
    for (std::int64_t i = 0; i < tile.count; i += kScoreQueries) {
      if (i > 0) group.following = {};  // once is enough
      const Queries queries = tile.some(i, kScoreQueries);
      const std::int64_t end = std::min(group.last, queries.most_visible());
      if (queries.count == 1) {
        dot_rows<1>(queries, group, end);
      } else if (queries.count == 2) {
        dot_rows<2>(queries, group, end);
      } else {
        dot_rows<kScoreQueries>(queries, group, end);
      }
    }
  });
}

// ---- softmax ----

/// The largest lane, +0 for either zero; NaN where `nan` has a lane.
inline float largest_lane(const Floats& a, const Ints& nan) {
  float lanes[kLanes], nans[kLanes];
  store(lanes, a);
  store(nans, select(nan, all(std::numeric_limits<float>::quiet_NaN()), all(0.0f)));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
      nans[i] += nans[i + half];
    }
  }
  return lanes[0] + nans[0];
}

/// From dots to weights of the values, in place: `count` visible positions.
struct Softmax {
  float scale;
  const float* key_scales;    // null: none
  const float* value_scales;  // null: none
  float largest;
  float sum;

  /// Calls part(i, piece) for sixteen positions from i on, the last time perhaps for fewer.
  template <class Part>
  [[gnu::always_inline]] static void in_parts(std::int64_t count, const Part& part) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) part(i, Whole{});
    if (i < count) part(i, First{count - i});
  }

  void run(float* scores, std::int64_t count) {
    const Floats lowest = all(-std::numeric_limits<float>::infinity());
    Floats most = lowest;
    Ints nan = all(0);
    in_parts(count, [&](std::int64_t i, const auto& piece) {
      Floats score = load(scores + i);
      if (key_scales != nullptr) score = score * piece.load(key_scales + i);
      score = score * all(scale);
      store(scores + i, score);
      score = piece.present(score, lowest);
      most = select(most < score, score, most);
      nan = nan | unordered(score, score);
    });
    largest = largest_lane(most, nan);
    Floats lanes = all(0.0f);
    in_parts(count, [&](std::int64_t i, const auto& piece) {
      const Floats p = exp(load(scores + i) - all(largest));
      lanes = piece.present(lanes + p, lanes);
      store(scores + i, value_scales == nullptr ? p : p * piece.load(value_scales + i));
    });
    sum = fold(lanes);
  }
};

// ---- the weighted sum of values ----

/// o[query] = fma(weight[query][j], value_j, o[query]) for the positions of a group in order, from 0 where it is the
/// first one, for kVectors pieces of the columns from d on.
template <int kQueries, int kVectors, class Piece, class Element>
inline void add_values(const float* const (&weights)[kQueries], const Group<Element>& values, std::int64_t d,
                       const Piece& piece, float* const (&o)[kQueries]) {
  Floats sums[kQueries][kVectors];
#pragma GCC unroll 4
  for (int query = 0; query < kQueries; ++query) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      sums[query][i] = values.first == 0 ? all(0.0f) : piece.load(o[query] + d + i * kLanes);
    }
  }
  for (std::int64_t j = values.first; j < values.last; ++j) {
    const Element* row = values.row(j) + d;
    values.following.prefetch(j - values.first, d, kVectors * kLanes);
    Floats value[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) value[i] = piece.load(row + i * kLanes);
#pragma GCC unroll 4
    for (int query = 0; query < kQueries; ++query) {
      const Floats weight = all(weights[query][j]);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sums[query][i] = fma(weight, value[i], sums[query][i]);
    }
  }
#pragma GCC unroll 4
  for (int query = 0; query < kQueries; ++query) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) piece.store(o[query] + d + i * kLanes, sums[query][i]);
  }
}

/// The same for all columns from d on, in pieces of kVectors vectors, then half as many, and so on.
template <int kQueries, int kVectors, class Element>
inline void add_columns(const float* const (&weights)[kQueries], const Group<Element>& values, std::int64_t d,
                        float* const (&o)[kQueries]) {
  for (; d + kVectors * kLanes <= values.head_dim; d += kVectors * kLanes) {
    add_values<kQueries, kVectors>(weights, values, d, Whole{}, o);
  }
  if constexpr (kVectors > 1) {
    add_columns<kQueries, kVectors / 2>(weights, values, d, o);
  } else if (d < values.head_dim) {
    add_values<kQueries, 1>(weights, values, d, First{values.head_dim - d}, o);
  }
}

/// The same for up to kQueries queries; where there are fewer, the last one stands in and is written again.
template <int kQueries, class Element>
inline void add_rows(const Queries& queries, const Group<Element>& values) {
  if (values.first >= values.last) return;
  const float* weights[kQueries];
  float* o[kQueries];
  for (int i = 0; i < kQueries; ++i) {
    const std::int64_t query = std::min<std::int64_t>(i, queries.count - 1);
    weights[i] = queries.scores + query * kBlockPositions;
    o[i] = queries.output[query];
  }
  // Eight at most: as many again hold the values.
  add_columns<kQueries, std::min(8, kSums / kQueries)>(weights, values, 0, o);
}

template <class Element>
inline void add_rows(const Queries& queries, const Group<Element>& values) {
  if (queries.count == 1) {
    add_rows<1>(queries, values);
  } else if (queries.count == 2) {
    add_rows<2>(queries, values);
  } else {
    add_rows<kValueQueries>(queries, values);
  }
}

/// The weighted sums of all queries of a tile: positions that all queries of a register tile see together, the rest for
/// each alone.
template <class Element>
inline void weighted_values(const Queries& tile, const Element* values, std::int64_t head_dim, float* wide) {
  in_groups(tile, values, head_dim, kValuePositions, wide, [&](auto group) {
    for (std::int64_t i = 0; i < tile.count; i += kValueQueries) {
      if (i > 0) group.following = {};
      const Queries queries = tile.some(i, kValueQueries);
      const std::int64_t common = queries.least_visible();
      if (group.last <= common) {
        add_rows(queries, group);
        continue;
      }
      const std::int64_t middle = std::max(group.first, common);
      add_rows(queries, group.part(group.first, middle));
      for (std::int64_t query = 0; query < queries.count; ++query) {
        const std::int64_t end = std::min<std::int64_t>(group.last, queries.visible[query]);
        add_rows(queries.some(query, 1), group.part(middle, end));
      }
    }
  });
}

// ---- the table ----

template <class Element>
inline void attend(const BlockAttention& block, float* scratch) {
  const auto* keys = static_cast<const Element*>(block.keys);
  const auto* values = static_cast<const Element*>(block.values);
  constexpr bool kScaled = std::is_same_v<Element, std::int8_t>;
  const Queries all_queries{block.q, block.visible, block.output, nullptr, block.queries};
  float* wide = scratch;
  float* scores = scratch + kWideFloats;
  for (std::int64_t first = 0; first < block.queries; first += kTileQueries) {
    Queries tile = all_queries.some(first, kTileQueries);
    tile.scores = scores;
    dots(tile, keys, block.head_dim, wide);
    for (std::int64_t i = 0; i < tile.count; ++i) {
      Softmax softmax{.scale = block.scale,
                      .key_scales = kScaled ? block.key_scales : nullptr,
                      .value_scales = kScaled ? block.value_scales : nullptr,
                      .largest = 0,
                      .sum = 0};
      softmax.run(tile.scores + i * kBlockPositions, tile.visible[i]);
      block.largest[first + i] = softmax.largest;
      block.sum[first + i] = softmax.sum;
    }
    weighted_values(tile, values, block.head_dim, wide);
  }
}

inline void attend_block(const BlockAttention& block, float* scratch) {
  switch (block.form) {
    case CacheForm::float32:
      return attend<float>(block, scratch);
    case CacheForm::float16:
      return attend<std::uint16_t>(block, scratch);
    case CacheForm::int8:
      return attend<std::int8_t>(block, scratch);
  }
}

inline void store_row(CacheForm form, const float* row, std::int64_t head_dim, void* out, float* scale) {
  switch (form) {
    case CacheForm::float32:
      std::memcpy(out, row, static_cast<std::size_t>(head_dim) * sizeof(float));
      return;
    case CacheForm::float16: {
      auto* halves = static_cast<std::uint16_t*>(out);
      std::int64_t d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) store_float16(halves + d, load(row + d));
      for (; d < head_dim; ++d) halves[d] = bitcore::float_to_float16(row[d]);
      return;
    }
    case CacheForm::int8:
      *scale = bitcore::x_scale_of(bitcore::absmax_bits(row, head_dim));
      bitcore::quantize_x_row(row, head_dim, *scale, static_cast<std::int8_t*>(out));
      return;
  }
}

inline float exp_of(float x) {
  float lanes[kLanes];
  store(lanes, exp(all(x)));
  return lanes[0];
}

inline void merge(float m, float l, const float* o, std::int64_t head_dim, float* M, float* L, float* O) {
  const float largest = std::isnan(m) || m > *M ? m : *M;  // a NaN in M stays: nothing is larger
  const float before = exp_of(*M - largest), now = exp_of(m - largest);
  *M = largest;
  *L = *L * before + l * now;
  const Floats a = all(before), c = all(now);
  map(
      head_dim, O, [&](const Floats& sum, const Floats& term) { return sum * a + term * c; }, O, o);
}

inline void finish(float L, std::int64_t head_dim, float* O) {
  const Floats divisor = all(L);
  map(
      head_dim, O, [&](const Floats& values) { return values / divisor; }, O);
}

constexpr AttentionFunctions make_attention_functions() {
  return {.store_row = store_row, .attend_block = attend_block, .merge = merge, .finish = finish};
}

}  // namespace
}  // namespace bitlayers
