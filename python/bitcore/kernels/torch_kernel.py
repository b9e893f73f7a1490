"""TorchKernel: the whole contract, forward and backward, in plain torch operations, for any device that torch has."""

from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.operators import native


class TorchKernel(OperatorKernel):
    """Serves every device that has no native kernel, and checks all others.

    Its operations: `bitcore.operators.torch_ops`. float32 activations are multiplied in float64, the sums rounded once
    to float32: neither the number of rows nor the precision that torch is set to for float32 matmul shows.
    """

    inference_op = staticmethod(native.torch_bitlinear)
    training_op = staticmethod(native.torch_bitlinear_train)
