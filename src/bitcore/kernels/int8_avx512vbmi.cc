// AVX-512 VNNI and VBMI, which reads the 1.6-bit layout as it is. Everything: int8_avx512-inl.h.
#include "bitcore/kernels/int8_avx512-inl.h"

#ifndef __AVX512VBMI__
#error "compile this file with VBMI"
#endif

namespace bitcore {

constinit const TileFunctions kInt8Avx512VbmiTiles = avx512_tiles();

}  // namespace bitcore
