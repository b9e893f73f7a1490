// Row functions for AVX-512 F, BW, DQ, VL.
#include "bitcore/quantize/quantize_avx512-inl.h"
#include "bitcore/quantize/row_functions-inl.h"

namespace bitcore {
namespace {

constexpr RowFunctions avx512_row_functions() {
  RowFunctions functions = make_row_functions();
  functions.quantize_x = quantize_x_row_avx512;
  return functions;
}

}  // namespace

constinit const RowFunctions kAvx512RowFunctions = avx512_row_functions();

}  // namespace bitcore
