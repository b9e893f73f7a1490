"""What a kernel is: one whole linear."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.operators import native


class BitKernelBase:
    """Base class of every kernel.

    A subclass defines `__call__` and `is_compatible_with`, and becomes available by `KernelRegistry.register`.
    `bitcore.testing.check_kernel` runs the whole contract on it. A kernel keeps no state between calls; any number of
    threads may call it at once. What every kernel guarantees: README.md and docs/contract.md.

    A kernel that keeps the standard packed form (does not override `prepare_weights`) gets the straight-through
    gradients from `bitlinear.forward`, in inference and training. One with a form of its own must be differentiable by
    itself where gradients are asked for.

    Attributes:
        name: Unique in the registry; the class's name unless set.
        device_types: Where it runs, for example ("cpu",); None: everywhere.
        requirement: What it needs of the machine, for people.
        path: The multiply-adds that it is made of, as `bitlab bench` names its limits; empty: not known.
        quant_config: The config that it is bound to, or None.
    """

    name: str = "BitKernelBase"
    requirement: str = "any machine"
    path: str = ""
    device_types: ClassVar[tuple[str, ...] | None] = None
    quant_config: BitQuantConfig | None = None

    def __init__(self, quant_config: BitQuantConfig | None = None) -> None:
        self.quant_config = quant_config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if "__call__" in cls.__dict__:
            cls.__call__ = _with_bound_config(cls.__call__)  # type: ignore[method-assign]

    def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        """Weights ready for inference: the standard packed form unless overridden.

        Args:
            weight: (out_features, in_features), float32, bfloat16 or float16.
            quant_config: The quantization schema.

        Returns:
            qweight_scale, float32: () per_tensor, (out_features,) per_channel; float16 (out_features, groups)
            per_group; and qweight, uint8.

        Raises:
            QuantizationError: wrong rank or dtype, a NaN or an infinity in the weight.
        """
        config = require_config(quant_config)
        weight = native.detached("weight", weight)
        return native.call(native.prepare_weights, weight, config.flags[0], "auto", config.weight_group_size)

    def accepts(self, qweight: Tensor) -> bool:
        """Whether qweight is in the form that the kernel reads.

        Unless overridden: uint8 for a kernel of the standard form. One that overrides `prepare_weights` overrides this
        as well; if it does not: anything but the two public forms, packed bytes (uint8) and codes (int8, 2-D), which
        may come from anywhere and would be taken for the kernel's own. `bitlinear.prepare_weights` raises where a
        kernel does not accept what it prepared itself.
        """
        if self.has_standard_form():
            return qweight.dtype == torch.uint8
        return qweight.dtype != torch.uint8 and not (qweight.dtype == torch.int8 and qweight.ndim == 2)

    def has_standard_form(self) -> bool:
        """Whether the kernel reads what the default `prepare_weights` returns."""
        return type(self).prepare_weights is BitKernelBase.prepare_weights

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        """y = float(sum_k q_x q_w) * (s_x * s_w) + bias.

        Args:
            x: (*, in_features), float32, bfloat16 or float16.
            qweight_scale: As prepare_weights returns it.
            qweight: As prepare_weights returns it.
            bias: (out_features,), floating, or None.
            quant_config: The quantization schema; None: the one that the kernel is bound to.

        Returns:
            (*, out_features), x's dtype.

        Raises:
            QuantizationError: arguments that do not fit, or no config.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool | None:
        """Whether the kernel computes this config; None means no."""
        raise NotImplementedError(f"{type(self).__name__} defines no is_compatible_with")

    def is_supported(self) -> bool:
        """Whether this machine meets the requirement."""
        return True

    def covers(self, quant_config: BitQuantConfig, device_type: str) -> bool:
        """Whether the kernel runs here, on that kind of device, for that config."""
        on_device = self.device_types is None or device_type in self.device_types
        return on_device and self.is_supported() and bool(self.is_compatible_with(quant_config))


def _with_bound_config(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives a kernel's `__call__` the bound config where the caller gives none."""

    @functools.wraps(function)
    def call(
        self: BitKernelBase,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        config = require_config(self.quant_config if quant_config is None else quant_config)
        return function(self, x, qweight_scale, qweight, bias, config)

    return call
