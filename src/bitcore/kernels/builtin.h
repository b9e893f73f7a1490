// The built-in kernels. A kernel made of tile functions is one new file that defines its table, a declaration here and
// a line in the list of registry.cc.
//
// The tables are constants, not functions: nothing that is compiled for an instruction set runs before the CPU has been
// asked whether it has it.
#pragma once

#include <memory>

#include "bitcore/kernels/base.h"
#include "bitcore/kernels/tile_functions.h"

namespace bitcore {

extern const TileFunctions kFloat32Avx2Tiles;      // float32_avx2.cc
extern const TileFunctions kFloat32Avx512Tiles;    // float32_avx512.cc
extern const TileFunctions kFloat32NeonTiles;      // float32_neon.cc
extern const TileFunctions kFloat32PortableTiles;  // float32_portable.cc
extern const TileFunctions kInt8Avx2Tiles;         // int8_avx2.cc
extern const TileFunctions kInt8Avx512VbmiTiles;   // int8_avx512vbmi.cc
extern const TileFunctions kInt8Avx512VnniTiles;   // int8_avx512vnni.cc
extern const TileFunctions kInt8AvxVnniTiles;      // int8_avxvnni.cc
extern const TileFunctions kInt8NeonDotTiles;      // int8_neondot.cc
extern const TileFunctions kInt8NeonTiles;         // int8_neon.cc
extern const TileFunctions kInt8PortableTiles;     // int8_portable.cc

/// Plain loops for every config.
std::shared_ptr<const BitKernelBase> make_reference_kernel();

}  // namespace bitcore
