// Row functions for AVX-512 F, BW, DQ, VL.
#include "row_functions-inl.h"

namespace bitcore {

constinit const RowFunctions kAvx512RowFunctions = make_row_functions();

}  // namespace bitcore
