"""The operators `torch.ops.bitcore.*` as Python completes them: other devices, fakes, autograd.

bindings/torch/library.cc holds their schemas and what a CPU runs. Importing this module loads them. Each has

- a function for every other device: the one of the same name in `torch_ops`;
- a fake (shape and dtype inference) that checks what the operator checks;
- for the layer, the straight-through backward.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitcore import _library
from bitcore._torch_private import Function, below_autograd, forward_mode_is_active, is_tracing
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.operators import checks, flops, torch_ops

_library.load()
_lib = torch.library.Library("bitcore", "FRAGMENT")
_lib.define("checked_scale(Tensor qweight_scale, Tensor qweight, int in_features) -> Tensor")
_LAYER_PREFIXES = ("", "torch_")


# ---- calling ---------------------------------------------------------------------------------------------------------


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator; an engine error is raised as the class that its message names.

    Raises:
        QuantizationError, KernelNotFoundError
    """
    try:
        return op(*args)
    except RuntimeError as error:
        _refuse_nested(op, args)
        raise _documented(error) from None


def _refuse_nested(op: Any, args: tuple[Any, ...]) -> None:
    # Afterwards, because torch does not even reach an operator's own checks with a nested tensor.
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, Tensor):
            checks.dense(argument.name, value)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises for a tensor with a tangent of forward-mode AD, which torch would drop silently.

    Raises:
        NotImplementedError
    """
    if not forward_mode_is_active():
        return
    if any(isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("bitlinear has no forward-mode derivative (jvp, dual numbers): use backward")


def infer(op: Callable[..., Any], x: Tensor, scale: Any, qweight: Any, bias: Any, *rest: Any) -> Any:
    """Calls an inference operator; where nothing asks for a gradient, without the detour over autograd in Python.

    Raises:
        NotImplementedError: x or bias carries a tangent.
    """
    refuse_tangents(x, bias)
    if torch.compiler.is_compiling() or is_tracing():
        return call(op, x, scale, qweight, bias, *rest)
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad)):
        return _Inference.apply(x, scale, qweight, bias, *rest, op)
    with below_autograd():
        return call(op, x, scale, qweight, bias, *rest)


def train(op: Callable[..., Any], x: Tensor, weight: Any, bias: Any, *rest: Any) -> Tensor:
    """Calls a training operator; returns y.

    Raises:
        NotImplementedError: x, weight or bias carries a tangent.
    """
    refuse_tangents(x, weight, bias)
    if torch.compiler.is_compiling() or is_tracing() or not torch.is_grad_enabled():
        return call(op, x, weight, bias, *rest)[0]
    return _Training.apply(x, weight, bias, *rest, op)


def _documented(error: RuntimeError) -> RuntimeError | BitLabError:
    text = str(error)
    name, _, message = text.partition(": ")
    for documented in (QuantizationError, KernelNotFoundError):
        if name == documented.__name__:
            return documented(message)
    if "Expected a value of type" in text:  # torch's own check of the arguments' Python types
        return QuantizationError(text.partition("\n")[0])
    return error


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants y in; None outside of autocast."""
    device_type = "cpu" if x.is_cpu else x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


_NOTHING = nullcontext()


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """Inside, autocast changes nothing."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def detached(name: str, tensor: Tensor) -> Tensor:
    """The tensor without its graph.

    Raises:
        QuantizationError: it is None or no tensor.
    """
    checks.given(**{name: tensor})
    return tensor.detach()


# ---- other devices ---------------------------------------------------------------------------------------------------


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would run the matmuls inside in a lower precision."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with autocast_off(args[0].device.type):
            return function(*args)

    return run


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """A copy of value; its gradient goes to source."""
    checks.require(
        value.shape == source.shape, f"value has shape {tuple(value.shape)}, source has {tuple(source.shape)}"
    )
    return value.clone(memory_format=torch.contiguous_format)


for _name in (
    "compute_weight_scale",
    "quantize_weight",
    "dequantize_weight",
    "compute_x_scale",
    "quantize_x",
    "dequantize_x",
    "prepare_weights",
    "pack_weights",
    "unpack_weights",
    "check_qweight",
    "checked_scale",
):
    _lib.impl(_name, _without_autocast(getattr(torch_ops, _name)), "CompositeExplicitAutograd")
for _prefix in _LAYER_PREFIXES:
    for _name in ("bitlinear", "bitlinear_train"):
        _lib.impl(_prefix + _name, _without_autocast(getattr(torch_ops, _name)), "CompositeExplicitAutograd")
_lib.impl("bitlinear_backward", _without_autocast(torch_ops.bitlinear_backward), "CompositeExplicitAutograd")
_lib.impl("straight_through", straight_through, "CompositeExplicitAutograd")


# ---- fakes -----------------------------------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"bitcore::{name}", lib=_lib)


def _weight_scale_like(weight: Tensor, per_channel: bool, group_size: int) -> Tensor:
    checks.group_size(group_size, per_channel)
    shape = checks.weight_scale_shape(weight.shape[0], weight.shape[1], per_channel, group_size)
    return weight.new_empty(shape, dtype=checks.weight_scale_dtype(group_size))


def _packed_like(weight: Tensor, layout: str = "auto") -> Tensor:
    out_features, in_features = checks.matrix("qweight", weight)
    row_bytes = sum(checks.packed_row_bytes(out_features, in_features, layout))
    return weight.new_empty([out_features, row_bytes], dtype=torch.uint8)


@_fake("compute_weight_scale")
def _(weight: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.floating("weight", weight)
    checks.matrix("weight", weight)
    return _weight_scale_like(weight, per_channel, group_size)


@_fake("quantize_weight")
def _(weight: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.weight_and_scale(weight, scale, per_channel, group_size)
    return weight.new_empty(weight.shape, dtype=torch.int8)


@_fake("dequantize_weight")
def _(qweight: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.qweight_and_scale(qweight, scale, per_channel, group_size)
    return qweight.new_empty(qweight.shape, dtype=torch.float32)


@_fake("compute_x_scale")
def _(x: Tensor, int8_activations: bool, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.group_size(group_size, per_channel)
    checks.x_of_scale(x, int8_activations)
    return x.new_empty(checks.x_scale_shape(x, per_channel, group_size), dtype=torch.float32)


@_fake("quantize_x")
def _(x: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.x_and_scale(x, scale, per_channel, group_size)
    return x.new_empty(x.shape, dtype=torch.int8)


@_fake("dequantize_x")
def _(qx: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.qx_and_scale(qx, scale, per_channel, group_size)
    return qx.new_empty(qx.shape, dtype=torch.float32)


@_fake("prepare_weights")
def _(weight: Tensor, per_channel: bool, layout: str = "auto", group_size: int = 0) -> tuple[Tensor, Tensor]:
    checks.floating("weight", weight)
    checks.matrix("weight", weight)
    return _weight_scale_like(weight, per_channel, group_size), _packed_like(weight, layout)


@_fake("pack_weights")
def _(qweight: Tensor, layout: str = "auto") -> Tensor:
    checks.plain_codes(qweight)
    return _packed_like(qweight, layout)


@_fake("unpack_weights")
def _(qweight: Tensor, in_features: int, check: bool = True) -> Tensor:
    checks.packed(qweight, in_features)
    return qweight.new_empty([qweight.shape[0], in_features], dtype=torch.int8)


@_fake("check_qweight")
def _(qweight: Tensor, in_features: int) -> None:
    checks.packed(qweight, in_features)


@_fake("checked_scale")
def _(qweight_scale: Tensor, qweight: Tensor, in_features: int) -> Tensor:
    checks.packed(qweight, in_features)
    return torch.empty_like(qweight_scale)


@_fake("straight_through")
def _(value: Tensor, source: Tensor) -> Tensor:
    return value.new_empty(value.shape)


def _fake_bitlinear(
    x: Tensor,
    qweight_scale: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    int8_activations: bool,
    x_per_channel: bool,
    out_dtype: torch.dtype | None = None,
    kernel_name: str | None = None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> Tensor:
    shape, dtype = checks.inference(x, qweight_scale, qweight, bias, weight_per_channel, group_size, out_dtype)
    return x.new_empty(shape, dtype=dtype)


def _fake_bitlinear_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    int8_activations: bool,
    x_per_channel: bool,
    out_dtype: torch.dtype | None = None,
    kernel_name: str | None = None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = checks.training(x, weight, bias, out_dtype)
    x_group_size = group_size if x_per_group else 0
    x_scale_shape = checks.x_scale_shape(x, x_per_channel, x_group_size) if int8_activations else [0]
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(x.shape if int8_activations else [0], dtype=torch.int8),
        x.new_empty(x_scale_shape, dtype=torch.float32),
        _packed_like(weight),
        _weight_scale_like(weight, weight_per_channel, group_size),
    )


@_fake("bitlinear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    x_scale: Tensor | None,
    qweight: Tensor | None,
    qweight_scale: Tensor | None,
    in_features: int,
    weight_per_channel: bool,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = dx_dtype, dweight_dtype
    checks.backward(dy, x, x_scale, qweight, qweight_scale, in_features, weight_per_channel, group_size, *wanted)

    def gradient(shape: list[int], dtype: torch.dtype | None) -> Tensor:
        return dy.new_empty([0] if dtype is None else shape, dtype=dtype or torch.float32)

    return (
        gradient([*dy.shape[:-1], in_features], dx_dtype),
        gradient([dy.shape[-1], in_features], dweight_dtype),
        gradient([dy.shape[-1]], dbias_dtype),
    )


# ---- autograd: the straight-through estimator ------------------------------------------------------------------------
#
# dX = dY @ dq(W), dW = dY^T @ dq(x), db = sum over rows of dY: one operator, bitlinear_backward, computes those that
# are wanted.


def _keep_for_inference(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    x, qweight_scale, qweight, bias, ctx.weight_per_channel = inputs[:5]
    ctx.save_for_backward(qweight_scale, qweight)
    ctx.groups = tuple(inputs[9:])
    ctx.in_features, ctx.x_dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward_inference(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    qweight_scale, qweight = ctx.saved_tensors  # Checkpointing computes them here, by a forward that records gradients.
    needs = ctx.needs_input_grad
    dx_dtype = ctx.x_dtype if needs[0] else None
    dbias_dtype = ctx.bias_dtype if needs[3] else None
    dtypes = dx_dtype, None, dbias_dtype
    dx, _, dbias = bitlinear_backward(
        dy, None, None, qweight, qweight_scale, ctx.in_features, ctx.weight_per_channel, *dtypes, *ctx.groups
    )
    return dx if needs[0] else None, None, None, dbias if needs[3] else None, *_NO_GRADIENTS


def _keep_for_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _save_for_training(ctx, inputs, output)


def _save_for_training(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, weight_per_channel, int8_activations = inputs[:5]
    ctx.groups = tuple(inputs[8:])
    _, qx, x_scale, qweight, qweight_scale = output
    # A parameter lives anyway: its codes are computed anew, in little time. Another weight would be kept alive for it.
    again = isinstance(weight, torch.nn.Parameter) and not weight.is_inference()  # Those cannot be saved.
    kept_weight = weight if again else qweight
    ctx.save_for_backward(qx if int8_activations else x, x_scale, kept_weight, qweight_scale)
    bias_dtype = None if bias is None else bias.dtype
    ctx.kept = x.shape[-1], weight_per_channel, x.dtype, weight.dtype, bias_dtype


def _backward_training(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    if dy is None:
        return None, None, None, *_NO_GRADIENTS
    x, x_scale, kept_weight, qweight_scale = ctx.saved_tensors  # As in _backward_inference.
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    in_features, weight_per_channel, x_dtype, weight_dtype, bias_dtype = ctx.kept
    dx, dweight, dbias = bitlinear_backward(
        dy,
        x,
        x_scale,
        kept_weight,
        qweight_scale,
        in_features,
        weight_per_channel,
        x_dtype if needs_x else None,
        weight_dtype if needs_weight else None,
        bias_dtype if needs_bias else None,
        *ctx.groups,
    )
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        *_NO_GRADIENTS,
    )


_NO_GRADIENTS = (None,) * 7  # of the arguments after the tensors


# An operator with its gradient as an autograd.Function: what torch makes of a registered gradient is the same for every
# operator and costs a small layer several times the rest of the step. Compilers and direct calls of the operator get
# the registered one, whose functions are the same. Gradients of arguments that a call leaves out are None, which torch
# ignores.


class _Inference(Function):
    """The inference operator, which is the last argument, of the arguments before it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, op = arguments
        with below_autograd():
            y = call(op, *inputs)
        _keep_for_inference(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward_inference(ctx, dy), None


class _Training(Function):
    """The training operator, which is the last argument, of the arguments before it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, op = arguments
        with below_autograd():
            outputs = call(op, *inputs)
        _save_for_training(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward_training(ctx, dy), None


def _refuse_second_derivative() -> None:
    # Gradients are recorded here only for create_graph=True. Those of the straight-through estimator are no
    # derivatives of the forward, so that differentiating them again would give silently wrong numbers.
    if torch.is_grad_enabled():
        raise NotImplementedError("bitlinear has no second derivative: call backward or grad without create_graph=True")


def _keep_dtype(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.source_dtype = inputs[1].dtype


def _to_source(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
    return None, gradient.to(ctx.source_dtype)


for _prefix in _LAYER_PREFIXES:
    _fake(f"{_prefix}bitlinear")(_fake_bitlinear)
    _fake(f"{_prefix}bitlinear_train")(_fake_bitlinear_train)
    torch.library.register_autograd(
        f"bitcore::{_prefix}bitlinear", _backward_inference, setup_context=_keep_for_inference, lib=_lib
    )
    torch.library.register_autograd(
        f"bitcore::{_prefix}bitlinear_train", _backward_training, setup_context=_keep_for_training, lib=_lib
    )
torch.library.register_autograd("bitcore::straight_through", _to_source, setup_context=_keep_dtype, lib=_lib)


# ---- the operators, resolved once ------------------------------------------------------------------------------------

compute_weight_scale = torch.ops.bitcore.compute_weight_scale.default
quantize_weight = torch.ops.bitcore.quantize_weight.default
dequantize_weight = torch.ops.bitcore.dequantize_weight.default
compute_x_scale = torch.ops.bitcore.compute_x_scale.default
quantize_x = torch.ops.bitcore.quantize_x.default
dequantize_x = torch.ops.bitcore.dequantize_x.default
prepare_weights = torch.ops.bitcore.prepare_weights.default
pack_weights = torch.ops.bitcore.pack_weights.default
unpack_weights = torch.ops.bitcore.unpack_weights.default
check_qweight = torch.ops.bitcore.check_qweight.default
checked_scale = torch.ops.bitcore.checked_scale.default
bitlinear = torch.ops.bitcore.bitlinear.default
bitlinear_train = torch.ops.bitcore.bitlinear_train.default
bitlinear_backward = torch.ops.bitcore.bitlinear_backward.default
torch_bitlinear = torch.ops.bitcore.torch_bitlinear.default
torch_bitlinear_train = torch.ops.bitcore.torch_bitlinear_train.default
attach_gradient = torch.ops.bitcore.straight_through.default
list_kernels = torch.ops.bitcore.list_kernels.default
kernel_tile_calls = torch.ops.bitcore.kernel_tile_calls.default

flops.register()
