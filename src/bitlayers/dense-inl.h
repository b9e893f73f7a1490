// Products of activations with a matrix that is not ternary, and its rows.
//
// Each output is a chain of fused multiply-adds of its own, one addition in 16 lanes after the other. A tile of tokens
// x rows keeps as many of them in flight as hide the latency of an addition and fit into the registers. With few tokens
// the time is that of reading the matrix, each element of which is read once and widened in registers. With many it is
// that of the arithmetic: then rows are widened into a panel first, once for many tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bitlayers/layer_functions.h"
#include "bitlayers/vector-inl.h"

namespace bitlayers {
namespace {

// std::min() would be one function for all instruction sets.
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// ---- element types

struct Float32Elements {
  using Element = float;
  static Native::F load(const float* p) { return Native::load(p); }
};
struct BFloat16Elements {
  using Element = std::uint16_t;
  static Native::F load(const std::uint16_t* p) { return Native::from_bfloat16(p); }
};
struct Float16Elements {
  using Element = std::uint16_t;
  static Native::F load(const std::uint16_t* p) { return Native::from_float16(p); }
};
struct Int8Elements {
  using Element = std::int8_t;
  static Native::F load(const std::int8_t* p) { return Native::from_int8(p); }
};

template <class Elements>
[[gnu::always_inline]] inline Floats load_all_of(const typename Elements::Element* p) {
  return load_parts(p, [](const typename Elements::Element* q) { return Elements::load(q); });
}
template <class Elements>
inline Floats load_first_of(const typename Elements::Element* p, std::int64_t count) {
  typename Elements::Element sixteen[kLanes];
  copy_first(p, count, sixteen);
  return load_all_of<Elements>(sixteen);
}

/// Calls function(Elements()) for the elements of a dtype.
template <class Function>
inline void with_elements(bitcore::DType dtype, const Function& function) {
  switch (dtype) {
    case bitcore::DType::bfloat16:
      return function(BFloat16Elements());
    case bitcore::DType::float16:
      return function(Float16Elements());
    case bitcore::DType::int8:
      return function(Int8Elements());
    default:
      return function(Float32Elements());
  }
}

// ---- tiles

#if defined(__AVX512F__)
// 4 x 6 sums, 4 activations and a weight in 32 registers. A single token meets 8 rows: two fused multiply-adds begin in
// a cycle, and one takes four.
inline constexpr int kTokenTile = 4;
inline constexpr int kRowTile = 6;
inline constexpr int kSingleTokenRows = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
// AVX2: 2 x 3 sums of two registers each, 2 activations and a weight in 16. (NEON: four registers each, of 32.)
inline constexpr int kTokenTile = 2;
inline constexpr int kRowTile = 3;
inline constexpr int kSingleTokenRows = 4;
#else
// Where fused multiply-adds are computed in many steps, more of them only make the code longer.
inline constexpr int kTokenTile = 2;
inline constexpr int kRowTile = 1;
inline constexpr int kSingleTokenRows = 1;
#endif

/// Rows of activations, or a part of their columns.
struct Activations {
  const float* first;
  std::int64_t stride;  // elements from row to row

  const float* row(std::int64_t index) const { return first + index * stride; }
  Activations from(std::int64_t row_index, std::int64_t col) const { return {row(row_index) + col, stride}; }
};

/// Rows of weights: of the matrix, or of a panel.
template <class ElementsType, bool kPrefetches>
struct Weights {
  using Elements = ElementsType;
  using Element = typename Elements::Element;
  const Element* first;
  std::int64_t stride;  // elements from row to row

  template <int kRows>
  Native::F load(int row, std::int64_t col) const {
    const Element* p = first + row * stride + col;
    // The same place of the next tile: rows are too short for the CPU to find out by itself in time.
    if constexpr (kPrefetches) __builtin_prefetch(p + kRows * stride);
    return Elements::load(p);
  }
  Floats load_first(int row, std::int64_t col, std::int64_t count) const {
    return load_first_of<Elements>(first + row * stride + col, count);
  }
};

/// lanes[token][row] takes up one product in each lane of `part`.
template <int kTokens, int kRows, class LoadX, class LoadW>
[[gnu::always_inline]] inline void add_step(int part, const LoadX& load_x, const LoadW& load_w,
                                            Floats (&lanes)[kTokens][kRows]) {
  Native::F values[kTokens];
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) values[token] = load_x(token);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    const Native::F weights = load_w(row);
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      Native::F& sum = lanes[token][row].part[part];
      sum = Native::fma(values[token], weights, sum);
    }
  }
}

template <int kTokens, int kRows>
[[gnu::always_inline]] inline void copy_lanes(const Floats (*from)[kRows], Floats (*to)[kRows]) {
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) to[token][row] = from[token][row];
  }
}

/// The `left` < 16 columns from `col` on: lanes without an element do not change.
template <int kTokens, int kRows, class Rows>
[[gnu::noinline]] void add_last_products(const Activations& x, const Rows& w, std::int64_t col, std::int64_t left,
                                         Floats (*sums)[kRows]) {
  const Ints present = first_lanes(left);
  for (int token = 0; token < kTokens; ++token) {
    const Floats values = load_first(x.row(token) + col, left);
    for (int row = 0; row < kRows; ++row) {
      Floats& sum = sums[token][row];
      sum = select(present, fma(values, w.load_first(row, col, left), sum), sum);
    }
  }
}

/// sums[token][row], of kTokens x kRows, takes up the products of `count` columns.
template <int kTokens, int kRows, class Rows>
inline void add_products(const Activations& x, const Rows& w, std::int64_t count, Floats (*sums)[kRows]) {
  Floats lanes[kTokens][kRows];
  copy_lanes<kTokens, kRows>(sums, lanes);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t col = i + part * Native::kLanes;
      add_step(
          part, [&](int token) { return Native::load(x.row(token) + col); },
          [&](int row) { return w.template load<kRows>(row, col); }, lanes);
    }
  }
  copy_lanes<kTokens, kRows>(lanes, sums);
  if (i < count) add_last_products<kTokens, kRows>(x, w, i, count - i, sums);
}

/// Where outputs go, and what they are multiplied by.
struct Outputs {
  float* first;
  std::int64_t stride;  // elements from token to token
  const float* scale;   // of the first row; null: none

  void store(std::int64_t token, std::int64_t row, const Floats& lanes) const {
    const float sum = fold(lanes);
    first[token * stride + row] = scale == nullptr ? sum : sum * scale[row];
  }
  Outputs from(std::int64_t token, std::int64_t row) const {
    return {first + token * stride + row, stride, scale == nullptr ? nullptr : scale + row};
  }
};

template <int kTokens, int kRows>
inline void clear(Floats (&sums)[kTokens][kRows]) {
  for (auto& token : sums) {
    for (Floats& sum : token) sum = all(0.0f);
  }
}

/// Calls function(std::integral_constant<int, tokens>()) for 1 to kTokenTile tokens.
template <int kTokens = kTokenTile, class Function>
inline void with_tokens(std::int64_t tokens, const Function& function) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return with_tokens<kTokens - 1>(tokens, function);
  }
  function(std::integral_constant<int, kTokens>());
}

// ---- few tokens

// Measured: up to here it is faster to widen rows again for every tile than to keep a panel.
#if defined(__AVX512F__)
inline constexpr int kFewTokens = 16;
#else
inline constexpr int kFewTokens = 8;
#endif

template <class Elements, int kTokens, int kRows>
inline void dense_tile(const typename Elements::Element* w, std::int64_t cols, const Activations& x, const Outputs& y) {
  Floats sums[kTokens][kRows];
  clear(sums);
  add_products<kTokens, kRows>(x, Weights<Elements, true>{w, cols}, cols, sums);
  for (int token = 0; token < kTokens; ++token) {
    for (int row = 0; row < kRows; ++row) y.store(token, row, sums[token][row]);
  }
}

/// kRows rows and all tokens.
template <class Elements, int kRows>
inline void dense_rows(const typename Elements::Element* w, std::int64_t cols, const Activations& x,
                       std::int64_t tokens, const Outputs& y) {
  for (std::int64_t token = 0; token < tokens; token += kTokenTile) {
    with_tokens(smaller(kTokenTile, tokens - token),
                [&](auto size) { dense_tile<Elements, size(), kRows>(w, cols, x.from(token, 0), y.from(token, 0)); });
  }
}

template <class Elements>
inline void dense_of_few(const typename Elements::Element* w, std::int64_t rows, std::int64_t cols,
                         const Activations& x, std::int64_t tokens, const Outputs& y) {
  std::int64_t row = 0;
  if (tokens == 1) {
    for (; row + kSingleTokenRows <= rows; row += kSingleTokenRows) {
      dense_tile<Elements, 1, kSingleTokenRows>(w + row * cols, cols, x, y.from(0, row));
    }
  }
  for (; row + kRowTile <= rows; row += kRowTile) {
    dense_rows<Elements, kRowTile>(w + row * cols, cols, x, tokens, y.from(0, row));
  }
  for (; row < rows; ++row) dense_rows<Elements, 1>(w + row * cols, cols, x, tokens, y.from(0, row));
}

// ---- many tokens

// A panel of kRowTile x kPanelCols floats (12 KB with AVX-512) stays in the L1 cache beside the activations that pass
// by it. kChunkTokens share the work of widening, and their sums, 24 KB, lie on the stack; more would only move
// activations of common widths out of the L2 cache.
inline constexpr int kPanelCols = 512;
inline constexpr int kChunkTokens = kTokenTile * 16;

template <int kRows>
class Panel {
 public:
  /// All columns of kRows rows, with up to kChunkTokens tokens.
  template <class Elements>
  void dense(const typename Elements::Element* w, std::int64_t cols, const Activations& x, std::int64_t tokens,
             const Outputs& y) {
    for (auto& tile : sums_) clear(tile);
    for (std::int64_t col = 0; col < cols; col += kPanelCols) {
      const std::int64_t count = smaller(kPanelCols, cols - col);
      for (int row = 0; row < kRows; ++row) widen<Elements>(w + row * cols + col, count, widened_[row]);
      add(x.from(0, col), tokens, count);
    }
    for (std::int64_t token = 0; token < tokens; ++token) {
      const Floats* sums = sums_[token / kTokenTile][token % kTokenTile];
      for (int row = 0; row < kRows; ++row) y.store(token, row, sums[row]);
    }
  }

 private:
  // 64 bytes beyond a power of two: otherwise what the rows have in one column would share a set of the L1 cache.
  static constexpr std::int64_t kStride = kPanelCols + kLanes;

  template <class Elements>
  static void widen(const typename Elements::Element* w, std::int64_t count, float* out) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load_all_of<Elements>(w + i));
    if (i < count) store(out + i, load_first_of<Elements>(w + i, count - i));
  }

  void add(const Activations& x, std::int64_t tokens, std::int64_t count) {
    const Weights<Float32Elements, false> rows{&widened_[0][0], kStride};
    for (std::int64_t token = 0; token < tokens; token += kTokenTile) {
      with_tokens(smaller(kTokenTile, tokens - token), [&](auto size) {
        add_products<size(), kRows>(x.from(token, 0), rows, count, sums_[token / kTokenTile]);
      });
    }
  }

  alignas(64) float widened_[kRows][kStride];
  Floats sums_[kChunkTokens / kTokenTile][kTokenTile][kRows];
};

template <class Elements>
inline void dense_of_many(const typename Elements::Element* w, std::int64_t rows, std::int64_t cols,
                          const Activations& x, std::int64_t tokens, const Outputs& y) {
  std::int64_t row = 0;
  for (; row + kRowTile <= rows; row += kRowTile) {
    Panel<kRowTile> panel;
    panel.template dense<Elements>(w + row * cols, cols, x, tokens, y.from(0, row));
  }
  for (; row < rows; ++row) dense_rows<Elements, 1>(w + row * cols, cols, x, tokens, y.from(0, row));
}

// ---- entries

/// A row of the matrix; `Elements` are those of its dtype.
template <class Elements>
inline const typename Elements::Element* row_of(const DenseMatrix& w, std::int64_t row) {
  return static_cast<const typename Elements::Element*>(w.data) + row * w.cols;
}

inline void dense(const DenseMatrix& w, std::int64_t first, std::int64_t last, const float* x, std::int64_t tokens,
                  std::int64_t x_stride, float* y, std::int64_t y_stride) {
  const bool scaled = w.dtype == bitcore::DType::int8;
  const Activations activations{x, x_stride};
  const Outputs outputs{y, y_stride, scaled ? w.scale + first : nullptr};
  with_elements(w.dtype, [&](auto elements) {
    using Elements = decltype(elements);
    const auto* rows = row_of<Elements>(w, first);
    if (tokens <= kFewTokens) {
      return dense_of_few<Elements>(rows, last - first, w.cols, activations, tokens, outputs);
    }
    for (std::int64_t token = 0; token < tokens; token += kChunkTokens) {
      dense_of_many<Elements>(rows, last - first, w.cols, activations.from(token, 0),
                              smaller(kChunkTokens, tokens - token), outputs.from(token, 0));
    }
  });
}

inline void dense_row(const DenseMatrix& w, std::int64_t row, float* out) {
  with_elements(w.dtype, [&](auto elements) {
    using Elements = decltype(elements);
    const auto* in = row_of<Elements>(w, row);
    const bool scaled = w.dtype == bitcore::DType::int8;
    const Floats scales = all(scaled ? w.scale[row] : 1.0f);
    const auto widened = [&](const Floats& values) { return scaled ? values * scales : values; };
    std::int64_t i = 0;
    for (; i + kLanes <= w.cols; i += kLanes) store(out + i, widened(load_all_of<Elements>(in + i)));
    if (i < w.cols) store_first(out + i, w.cols - i, widened(load_first_of<Elements>(in + i, w.cols - i)));
  });
}

}  // namespace
}  // namespace bitlayers
