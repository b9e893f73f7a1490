// int8_avxvnni.cc with its instruction in the encoding of AVX-512 VNNI: see int8_avxvnni_evex.h.
//
// CPU features: AVX2, FMA, AVX-512 F, VL, VNNI.
#include "bitcore/kernels/tile_functions.h"

namespace bitcore {
extern const TileFunctions kInt8AvxVnniEvexTiles;
}

#define BITCORE_EVEX
#include "bitcore/kernels/int8_avxvnni.cc"
