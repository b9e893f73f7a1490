// The choice between the attention functions of all instruction sets.
#include "bitlayers/attention_functions.h"

#include <algorithm>
#include <cassert>

#include "bitlayers/attention_function_tables.h"

namespace bitlayers {

std::int64_t scratch_floats(std::int64_t queries) {
  return kWideFloats + std::min(queries, kTileQueries) * kBlockPositions;
}

const AttentionFunctions& attention_functions(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::avx512:
      return kAvx512AttentionFunctions;
    case Path::avx2:
      return kAvx2AttentionFunctions;
#endif
#if defined(__aarch64__)
    case Path::neon:
      return kNeonAttentionFunctions;
#else
    case Path::portable:
      return kPortableAttentionFunctions;
#endif
    default:
      assert(path == Path::reference && "a path of another architecture");
      return kReferenceAttentionFunctions;
  }
}

}  // namespace bitlayers
