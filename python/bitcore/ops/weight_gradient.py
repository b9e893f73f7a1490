"""The weight's gradient where y comes from a packed copy of the weight: a trainable layer in evaluation mode.

Of bitcore, and not of the layers that use it, so that an exported model needs nothing but bitcore to be loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitcore._torch_private import Function
from bitcore.config import DEFAULT_GROUP_SIZE, BitQuantConfig
from bitcore.operators import native
from bitcore.ops.base import compute_x_scale, quantize_x


@torch.library.custom_op("bitcore::attach_weight_gradient", mutates_args=())
def _attach(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    int8_activations: bool,
    x_per_channel: bool,
    group_size: int = 0,
    x_per_group: bool = False,
) -> Tensor:
    return y.clone()


@_attach.register_fake
def _(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    int8_activations: bool,
    x_per_channel: bool,
    group_size: int = 0,
    x_per_group: bool = False,
) -> Tensor:
    return torch.empty_like(y)


def attach_weight_gradient(
    y: Tensor, x: Tensor, weight: Tensor, config: BitQuantConfig, on_gradient: Callable[[], None] | None = None
) -> Tensor:
    """y once more, through which the straight-through gradient, dY^T @ dq(x), reaches the weight.

    Args:
        y: (*, out_features), what inference on the packed weight returned for x.
        x: (*, in_features).
        weight: (out_features, in_features), floating.
        config: The schema that y was computed with.
        on_gradient: Called whenever the weight's gradient has been computed (but not by compiled code).
    """
    if not torch.compiler.is_compiling():
        # x gets no gradient here, and compiled autograd cannot take None for one.
        direct: Tensor = _Attached.apply(y, x.detach(), weight, config, on_gradient)
        return direct
    output: Tensor = _attach(y, x, weight, *config.flags[1:], *config.group_arguments)
    return output


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, weight, int8_activations, x_per_channel, group_size, x_per_group = inputs
    ctx.save_for_backward(x)
    ctx.weight_dtype = weight.dtype
    ctx.config = BitQuantConfig(
        "per_group" if group_size else "per_tensor",
        "int8" if int8_activations else "float32",
        "per_group" if x_per_group else "per_channel" if x_per_channel else "per_tensor",
        group_size or DEFAULT_GROUP_SIZE,
    )


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the straight-through estimator has no second derivative.
        raise NotImplementedError("BitLinear has no second derivative: call backward or grad without create_graph=True")
    dweight = _dweight(ctx, dy) if ctx.needs_input_grad[2] else None
    return dy, None, dweight, None, None, None, None


def _dweight(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    in_features, scale = x.shape[-1], None
    if ctx.config.activation_dtype == "int8":
        scale = compute_x_scale(x, ctx.config)
        x = quantize_x(x, scale, ctx.config)
    dweight: Tensor = native.bitlinear_backward(
        dy, x, scale, None, None, in_features, False, None, ctx.weight_dtype, None, *ctx.config.group_arguments
    )[1]
    return dweight


class _Attached(Function):
    """The operator without its way through torch's registered gradients: several times the rest of a small layer."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, x, weight, ctx.config, ctx.on_gradient = arguments
        ctx.save_for_backward(x)
        ctx.weight_dtype = weight.dtype
        output: Tensor = y.detach()
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(ctx, dy)
        if ctx.on_gradient is not None and ctx.needs_input_grad[2]:
            ctx.on_gradient()
        return gradients


_attach.register_autograd(_backward, setup_context=_keep)
