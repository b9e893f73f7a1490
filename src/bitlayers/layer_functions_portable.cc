// Layer functions for every CPU.
#include "bitlayers/layer_function_tables.h"
#include "bitlayers/layer_functions-inl.h"

namespace bitlayers {

constinit const LayerFunctions kPortableLayerFunctions = make_layer_functions();

}  // namespace bitlayers
