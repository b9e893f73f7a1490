"""Kernels as users write them, and the paths that a call of the layer can take through kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from core_helpers import PER_TOKEN, make_layer


class CustomKernel(BitKernelBase):
    """Standard form, int8 activations, gradients unknown to it. Counts its calls."""

    calls = 0

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        assert quant_config is not None
        type(self).calls += 1
        return native.torch_bitlinear(x.detach(), qweight_scale, qweight, bias, *quant_config.operator_arguments())

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return quant_config.activation_dtype == "int8"


class StandardForm(CustomKernel):
    """For both activation dtypes."""

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return True


class Doubled(CustomKernel):
    """Its results tell that it ran."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


class OwnForm(BitKernelBase):
    """Dequantized weights as its qweight, in float64, which no other form is in."""

    def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        return torch.ones(()), base.fake_quantize_weight(weight, quant_config).double()

    def accepts(self, qweight: Tensor) -> bool:
        return qweight.dtype == torch.float64

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        assert quant_config is not None
        y = base.fake_quantize_x(x, quant_config) @ qweight.float().t()
        return y if bias is None else y + bias

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return True


def infer(config: BitQuantConfig = PER_TOKEN) -> Tensor:
    """y of a small layer, prepared and computed by the kernels that the registry chooses."""
    layer = make_layer(5)
    return bitlinear.forward(layer.x, None, *bitlinear.prepare_weights(layer.weight, config), layer.bias, config)


@contextmanager
def registered(kernel: type[BitKernelBase]) -> Iterator[None]:
    KernelRegistry.register(kernel)
    try:
        yield
    finally:
        KernelRegistry.unregister(kernel.name)


PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "native": nullcontext,
    "TorchKernel": lambda: KernelRegistry.forced("TorchKernel"),
    "user kernel": lambda: registered(StandardForm),
    "user kernel, own form": lambda: registered(OwnForm),
}
