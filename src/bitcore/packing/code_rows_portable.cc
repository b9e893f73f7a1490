// Code rows for any CPU, and the choice between all.
#include "bitcore/base/cpu_features.h"
#include "bitcore/packing/code_rows-inl.h"

namespace bitcore {

constinit const CodeRows kPortableCodeRows = make_code_rows();

const CodeRows& code_rows() {
#if defined(__x86_64__)
  static const CodeRows& best = cpu_has_avx512() ? kAvx512CodeRows : cpu_has_avx2() ? kAvx2CodeRows : kPortableCodeRows;
  return best;
#else
  return kPortableCodeRows;
#endif
}

}  // namespace bitcore
