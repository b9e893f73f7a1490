// Attention for AVX2, FMA and F16C.
#include "bitlayers/attention-inl.h"
#include "bitlayers/attention_function_tables.h"

namespace bitlayers {

constinit const AttentionFunctions kAvx2AttentionFunctions = make_attention_functions();

}  // namespace bitlayers
