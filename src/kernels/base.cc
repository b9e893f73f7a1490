#include "bitcore/kernels/base.h"

namespace bitcore {

bitlinear::PreparedWeights BitKernelBase::prepare_weights(ConstMatrixView weight, const BitQuantConfig& config) const {
  return bitlinear::prepare_weights(weight, config);
}

bool BitKernelBase::accepts(ConstMatrixView qweight) const { return qweight.dtype == DType::uint8; }

}  // namespace bitcore
