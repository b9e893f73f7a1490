// Attention over a cache of keys and values, compiled for several instruction sets: all give the same bits, those of
// docs/contract.md. The functions neither allocate, thread, dispatch nor throw.
//
// A cache consists of blocks of 256 positions. Within a block the keys (and the values) of one layer and one head are
// contiguous: [position][head_dim] in the cache's form, int8 with one float32 scale for each position beside them.
#pragma once

#include <cstdint>

#include "bitlayers/path.h"

namespace bitlayers {

/// Positions of a block of the cache.
inline constexpr std::int64_t kBlockPositions = 256;

/// How keys and values are kept.
enum class CacheForm {
  float32,
  float16,  ///< Rounded once, after the rotation.
  int8,     ///< Codes and a scale per token and head: s = max(absmax, 1e-5) / 127.
};

/// Bytes of an element.
constexpr std::int64_t element_bytes(CacheForm form) {
  return form == CacheForm::float32 ? 4 : form == CacheForm::float16 ? 2 : 1;
}

/// Query vectors that meet the keys and values of one block of one head: adjacent tokens, and for each of them the
/// query heads that share the key head.
struct BlockAttention {
  CacheForm form;
  std::int64_t head_dim;      ///< From 2 on, even; any size.
  const void* keys;           ///< [position][head_dim]
  const void* values;         ///< [position][head_dim]
  const float* key_scales;    ///< int8: [position]
  const float* value_scales;  ///< int8: [position]
  float scale;                ///< Of the scores.

  std::int64_t queries;         ///< Query vectors, from 1 on.
  const float* const* q;        ///< [query]: head_dim floats each.
  const std::int32_t* visible;  ///< [query]: how many positions of the block it reads, 1 to 256.

  float* largest;        ///< [query]: m_b
  float* sum;            ///< [query]: l_b
  float* const* output;  ///< [query]: head_dim floats each: o_b
};

struct AttentionFunctions {
  /// Keys or values of one position and head into the cache's form.
  /// @param row head_dim floats. @param out head_dim elements. @param scale int8: its scale.
  void (*store_row)(CacheForm form, const float* row, std::int64_t head_dim, void* out, float* scale);

  /// One block: s_j = dot(q, k_j) * scale, m_b = max s_j (NaN if any is), p_j = exp(s_j - m_b), l_b the sum of p_j in
  /// dot's lanes and fold, o_b = fma(p_j, v_j, o_b) in order of j from 0. int8: s_j = (dot(q, float(k_j)) * s_k) *
  /// scale, and p_j * s_v in place of p_j in o_b.
  /// @param scratch scratch_floats(queries) floats, aligned to 64 bytes.
  void (*attend_block)(const BlockAttention& block, float* scratch);

  /// Merges a block's result (m, l, o) into that of the blocks before it: M' = max(M, m), a = exp(M - M'),
  /// c = exp(m - M'), L = L*a + l*c, O = O*a + o*c, products and sums separate.
  void (*merge)(float m, float l, const float* o, std::int64_t head_dim, float* M, float* L, float* O);

  /// O / L.
  void (*finish)(float L, std::int64_t head_dim, float* O);
};

/// Floats of scratch memory of attend_block.
std::int64_t scratch_floats(std::int64_t queries);

/// Those of a path that this CPU supports.
const AttentionFunctions& attention_functions(Path path);

}  // namespace bitlayers
