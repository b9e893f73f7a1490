// Attention for ARM64.
#include "bitlayers/attention-inl.h"
#include "bitlayers/attention_function_tables.h"

namespace bitlayers {

constinit const AttentionFunctions kNeonAttentionFunctions = make_attention_functions();

}  // namespace bitlayers
