// The tables that attention_functions() chooses from, each compiled for its instruction set.
#pragma once

#include "bitlayers/attention_functions.h"

namespace bitlayers {

extern const AttentionFunctions kReferenceAttentionFunctions;  // attention_functions_reference.cc
extern const AttentionFunctions kPortableAttentionFunctions;   // attention_functions_portable.cc; not for ARM64
extern const AttentionFunctions kAvx2AttentionFunctions;       // attention_functions_avx2.cc
extern const AttentionFunctions kAvx512AttentionFunctions;     // attention_functions_avx512.cc
extern const AttentionFunctions kNeonAttentionFunctions;       // attention_functions_neon.cc

// The scratch memory of attend_block: rows of keys or values widened to float32, up to 32 of the usual head_dim, then
// the scores of as many query vectors as are taken at a time against a block. Both are for an L1 cache: the scores are
// passed over a row at a time.
inline constexpr std::int64_t kWideFloats = 4096;
inline constexpr std::int64_t kTileQueries = 32;

}  // namespace bitlayers
