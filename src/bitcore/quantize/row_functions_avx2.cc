// Row functions for AVX2.
#include "bitcore/quantize/row_functions-inl.h"

namespace bitcore {

constinit const RowFunctions kAvx2RowFunctions = make_row_functions();

}  // namespace bitcore
