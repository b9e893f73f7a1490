// Int8AvxVnniKernel for CPUs that have its instruction in the encoding of AVX-512 VNNI only. It is no part of the
// library, where Int8Avx512VnniKernel is the better one: tests and benchmarks run that kernel's source by it.
#pragma once

#include <memory>

#include "bitcore/base/cpu_features.h"
#include "bitcore/kernels/tiled_kernel.h"

namespace bitcore {

extern const TileFunctions kInt8AvxVnniEvexTiles;  // int8_avxvnni_evex.cc

inline std::shared_ptr<const BitKernelBase> make_int8_avxvnni_evex_kernel() {
  return std::make_shared<TiledKernel>("Int8AvxVnniEvexKernel", "AVX-512 VNNI", cpu_has_avx512_vnni(), "vpdpbusd ymm",
                                       kInt8AvxVnniEvexTiles);
}

}  // namespace bitcore
