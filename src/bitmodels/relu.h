// ReLU in place, on the bits: the same for every compiler.
#pragma once

#include "bitcore/tensor.h"

namespace bitmodels {

/// What is above zero and what is NaN stays; all else becomes +0. x: floating and contiguous.
void relu(bitcore::MatrixView x);

}  // namespace bitmodels
