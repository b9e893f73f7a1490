// Code rows for AVX2.
#include "bitcore/packing/code_rows-inl.h"

namespace bitcore {

constinit const CodeRows kAvx2CodeRows = make_code_rows();

}  // namespace bitcore
