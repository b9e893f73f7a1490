// Layer functions for NEON.
#include "bitlayers/layer_function_tables.h"
#include "bitlayers/layer_functions-inl.h"

namespace bitlayers {

constinit const LayerFunctions kNeonLayerFunctions = make_layer_functions();

}  // namespace bitlayers
