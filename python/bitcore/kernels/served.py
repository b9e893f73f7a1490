"""How forward calls a kernel: three ways of a kernel's making, one interface.

The registry wraps every kernel once. A built-in one goes to its operators. One of the user's with the standard packed
form gets its checks, its codes packed and its gradients here; one with a form of its own brings its gradients itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.operators import checks, native

# Set while a registered kernel prepares weights in a form of its own: what it calls from there is the standard form.
_inside_own_form: ContextVar[bool] = ContextVar("inside_own_form", default=False)


class Served(ABC):
    """A kernel as `bitlinear` calls it. Arguments and errors are those of the functions there."""

    kernel: BitKernelBase

    def prepare(self, weight: Tensor, config: BitQuantConfig, layout: str) -> tuple[Tensor, Tensor]:
        """qweight_scale and qweight; `layout` is that of the standard form."""
        return native.call(native.prepare_weights, weight, config.flags[0], layout, config.weight_group_size)

    def takes(self, qweight: Tensor) -> bool:
        """Whether infer reads it."""
        return self.kernel.accepts(qweight)

    @abstractmethod
    def train(self, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        """y, with gradients for x, weight and bias."""

    @abstractmethod
    def infer(self, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        """y, with gradients for x and bias."""


def served(kernel: BitKernelBase) -> Served:
    """The kernel, wrapped for its kind."""
    if isinstance(kernel, OperatorKernel):
        return _Operators(kernel)
    return _StandardForm(kernel) if kernel.has_standard_form() else _OwnForm(kernel)


class _Operators(Served):
    def __init__(self, kernel: OperatorKernel) -> None:
        self.kernel: OperatorKernel = kernel

    def train(self, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        return self.kernel.train(x, weight, bias, config)

    def infer(self, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        return self.kernel(x, scale, qweight, bias, config)


class _StandardForm(Served):
    """Values by the kernel, gradients by those of `TorchKernel`'s operators."""

    def __init__(self, kernel: BitKernelBase) -> None:
        self.kernel = kernel

    def takes(self, qweight: Tensor) -> bool:
        return qweight.dtype == torch.int8 or self.kernel.accepts(qweight)

    def train(self, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        out_dtype = native.autocast_dtype(x)
        native.refuse_tangents(x, weight, bias)
        source, _, _, qweight, scale = native.call(
            native.torch_bitlinear_train, x, weight, bias, *config.operator_arguments(out_dtype)
        )
        with torch.no_grad():
            value = _call(self.kernel, x, scale, qweight, bias, config, source.shape, out_dtype)
        return native.attach_gradient(value, source)

    def infer(self, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        native.refuse_tangents(x, bias)
        out_dtype = native.autocast_dtype(x)
        weight_scales = config.flags[0], config.weight_group_size
        shape, _ = checks.inference(x, scale, qweight, bias, *weight_scales, out_dtype)
        packed = qweight if qweight.dtype == torch.uint8 else native.call(native.pack_weights, qweight)
        scale = native.call(native.checked_scale, scale.detach(), packed, x.shape[-1])
        with torch.no_grad():
            value = _call(self.kernel, x, scale, packed, bias, config, shape, out_dtype)
        if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            return value
        rest = config.operator_arguments(out_dtype)
        source = native.call(native.torch_bitlinear, x, scale, packed, bias, *rest)
        return native.attach_gradient(value, source)


class _OwnForm(Served):
    """The kernel prepares and reads a form of its own and is differentiable by itself."""

    def __init__(self, kernel: BitKernelBase) -> None:
        self.kernel = kernel

    def prepare(self, weight: Tensor, config: BitQuantConfig, layout: str) -> tuple[Tensor, Tensor]:
        if _inside_own_form.get():
            return super().prepare(weight, config, layout)
        checks.floating("weight", weight)
        checks.matrix("weight", weight)
        scale, qweight = self._prepared(weight, config)
        if not self.kernel.accepts(qweight):  # forward would hand it to another kernel
            raise QuantizationError(
                f"kernel {self.kernel.name} prepared a qweight of dtype {qweight.dtype} and shape "
                f"{tuple(qweight.shape)} that it does not accept: override accepts"
            )
        return scale, qweight

    def train(self, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        out_dtype = native.autocast_dtype(x)
        shape, _ = checks.training(x, weight, bias, out_dtype)
        y = _call(self.kernel, x, *self._prepared(weight, config), bias, config, shape, out_dtype)
        return self._require_gradient(y, x, weight, bias)

    def infer(self, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig) -> Tensor:
        shape = checks.own_form(x, bias)
        y = _call(self.kernel, x, scale, qweight, bias, config, shape, native.autocast_dtype(x))
        return self._require_gradient(y, x, bias)

    def _prepared(self, weight: Tensor, config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        token = _inside_own_form.set(True)
        try:
            prepared: object = self.kernel.prepare_weights(weight, config)
        finally:
            _inside_own_form.reset(token)
        if isinstance(prepared, tuple) and [isinstance(part, Tensor) for part in prepared] == [True, True]:
            scale, qweight = prepared
            return scale, qweight
        what = prepared if isinstance(prepared, tuple) else (prepared,)
        parts = ", ".join(checks.described(part) for part in what)
        raise QuantizationError(f"kernel {self.kernel.name}: prepare_weights returned {parts}, expected two tensors")

    def _require_gradient(self, y: Tensor, *inputs: Tensor | None) -> Tensor:
        """The kernel must not cut the graph silently."""
        wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        if wanted and not y.requires_grad:
            raise QuantizationError(
                f"kernel {self.kernel.name} has its own prepare_weights and returned y without a gradient, "
                "but an input requires one"
            )
        return y


def _call(
    kernel: BitKernelBase,
    x: Tensor,
    scale: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    config: BitQuantConfig,
    shape: Sequence[int | None],
    out_dtype: torch.dtype | None,
) -> Tensor:
    """What the kernel returns, checked; rounded once to the autocast dtype where there is one."""
    if out_dtype is not None:
        x = x.float()
    with native.autocast_off(x.device.type):
        y = checks.returned(kernel.name, kernel(x, scale, qweight, bias, config), x, shape)
    return y if out_dtype is None else y.to(out_dtype)
