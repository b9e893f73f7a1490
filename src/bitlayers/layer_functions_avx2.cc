// Layer functions for AVX2.
#include "bitlayers/layer_function_tables.h"
#include "bitlayers/layer_functions-inl.h"

namespace bitlayers {

constinit const LayerFunctions kAvx2LayerFunctions = make_layer_functions();

}  // namespace bitlayers
