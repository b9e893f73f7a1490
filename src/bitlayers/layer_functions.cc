#include "bitlayers/layer_functions.h"

#include <cassert>

#include "bitlayers/layer_function_tables.h"

namespace bitlayers {

const LayerFunctions& layer_functions(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::avx512:
      return kAvx512LayerFunctions;
    case Path::avx2:
      return kAvx2LayerFunctions;
#endif
#if defined(__aarch64__)
    case Path::neon:
      return kNeonLayerFunctions;
#else
    case Path::portable:
      return kPortableLayerFunctions;
#endif
    default:
      assert(path == Path::reference && "a path of another architecture");
      return kReferenceLayerFunctions;
  }
}

}  // namespace bitlayers
