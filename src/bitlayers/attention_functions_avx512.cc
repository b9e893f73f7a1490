// Attention for AVX-512 F, BW, DQ and VL.
#include "bitlayers/attention-inl.h"
#include "bitlayers/attention_function_tables.h"

namespace bitlayers {

constinit const AttentionFunctions kAvx512AttentionFunctions = make_attention_functions();

}  // namespace bitlayers
