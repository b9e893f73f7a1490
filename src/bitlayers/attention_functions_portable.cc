// Attention for any CPU.
#include "bitlayers/attention-inl.h"
#include "bitlayers/attention_function_tables.h"

namespace bitlayers {

constinit const AttentionFunctions kPortableAttentionFunctions = make_attention_functions();

}  // namespace bitlayers
