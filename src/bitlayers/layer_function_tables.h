// One table for each path; layer_functions() chooses.
#pragma once

#include "bitlayers/layer_functions.h"

namespace bitlayers {

extern const LayerFunctions kReferenceLayerFunctions;  // layer_functions_reference.cc
extern const LayerFunctions kPortableLayerFunctions;   // layer_functions_portable.cc; not compiled for ARM64
extern const LayerFunctions kAvx2LayerFunctions;       // layer_functions_avx2.cc
extern const LayerFunctions kAvx512LayerFunctions;     // layer_functions_avx512.cc
extern const LayerFunctions kNeonLayerFunctions;       // layer_functions_neon.cc

}  // namespace bitlayers
