// AVX-512 VNNI without VBMI: the 1.6-bit layout is rewritten at 2 bits first. Everything else: int8_avx512-inl.h.
#include "bitcore/kernels/int8_avx512-inl.h"

#ifdef __AVX512VBMI__
#error "compile this file without VBMI: CPUs that lack it run it"
#endif

namespace bitcore {

constinit const TileFunctions kInt8Avx512VnniTiles = avx512_tiles();

}  // namespace bitcore
