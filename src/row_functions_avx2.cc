// Row functions for AVX2.
#include "row_functions-inl.h"

namespace bitcore {

constinit const RowFunctions kAvx2RowFunctions = make_row_functions();

}  // namespace bitcore
