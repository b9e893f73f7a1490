"""A kernel behind operators, which fakes, autograd and compilers know: every built-in one."""

from typing import Any

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.kernels.base import BitKernelBase
from bitcore.operators import checks, native


class OperatorKernel(BitKernelBase):
    """One operator for inference, one for training."""

    inference_op: Any = staticmethod(native.bitlinear)
    training_op: Any = staticmethod(native.bitlinear_train)

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        """As BitKernelBase; under autocast y has the autocast dtype. x and bias get their gradients."""
        config = require_config(quant_config)
        checks.given(x=x, qweight_scale=qweight_scale, qweight=qweight)
        rest = config.operator_arguments(native.autocast_dtype(x), self.name)
        return native.infer(self.inference_op, x, qweight_scale, qweight, bias, *rest)

    def train(self, x: Tensor, weight: Tensor, bias: Tensor | None, quant_config: BitQuantConfig) -> Tensor:
        """The training forward: y as inference on the prepared weight returns it, with straight-through gradients."""
        rest = quant_config.operator_arguments(native.autocast_dtype(x), self.name)
        return native.train(self.training_op, x, weight, bias, *rest)

    def accepts(self, qweight: Tensor) -> bool:
        """Packed bytes, or int8 codes, which are packed on every call (slow)."""
        return qweight.dtype in (torch.uint8, torch.int8)

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        """Every config."""
        return True
