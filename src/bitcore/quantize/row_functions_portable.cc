// Row functions for any CPU, and the choice between all.
#include "bitcore/base/cpu_features.h"
#include "bitcore/quantize/row_functions-inl.h"

namespace bitcore {

constinit const RowFunctions kPortableRowFunctions = make_row_functions();

const RowFunctions& row_functions() {
#if defined(__x86_64__)
  static const RowFunctions& best = cpu_has_avx512() ? kAvx512RowFunctions
                                    : cpu_has_avx2() ? kAvx2RowFunctions
                                                     : kPortableRowFunctions;
  return best;
#else
  return kPortableRowFunctions;
#endif
}

}  // namespace bitcore
