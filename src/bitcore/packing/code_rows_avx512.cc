// Code rows for AVX-512 F, BW, DQ, VL.
#include "bitcore/packing/code_rows-inl.h"

namespace bitcore {

constinit const CodeRows kAvx512CodeRows = make_code_rows();

}  // namespace bitcore
