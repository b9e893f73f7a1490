"""The ternary linear layer: prepare_weights and forward."""

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.kernels.registry import STATE, candidates, select
from bitcore.ops import _checks, _ops
from bitcore.ops._config_keyword import either_config_name
from bitcore.ops.packing import check_qweight, pack_weights, repack, unpack_weights

__all__ = ["check_qweight", "forward", "pack_weights", "prepare_weights", "repack", "unpack_weights"]

# Set while a registered kernel prepares weights in a form of its own: what it calls from there is the standard form.
_inside_own_form: ContextVar[bool] = ContextVar("inside_own_form", default=False)


@either_config_name
def prepare_weights(weight: Tensor, config: BitQuantConfig, layout: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantizes and packs a weight for inference. Carries no gradient. On a GPU it synchronizes.

    Already ternary floats do not come back: their mean magnitude, the scale, is smaller than their magnitude. Pack
    codes with pack_weights and keep their magnitude as the scale instead.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16; finite.
        config: The quantization schema.
        layout: Of the packed bytes: "2bit", "1.6bit" (where it exists, see bitcore.ops.packing) or "auto", a fixed rule
            of the shape.

    Returns:
        qweight_scale, float32: () per_tensor, (out_features,) per_channel; and qweight: uint8 (out_features, R + T),
        R = 4 * ceil(in_features / 16), T = ceil(64 / out_features), or what a registered kernel's own prepare_weights
        returns.

    Raises:
        QuantizationError: wrong rank or dtype, a NaN or an infinity in the weight, an unknown layout.
        KernelNotFoundError: kernels are named and none of them covers the config.
    """
    per_channel = require_config(config).flags[0]
    weight = _ops.detached("weight", weight)
    if STATE.token:
        kernel = candidates(config, weight.device.type)[0]
        if not kernel.has_standard_form() and not _inside_own_form.get():
            _checks.floating("weight", weight)
            _checks.matrix("weight", weight)
            return _require_accepted(kernel, *_prepare_own_form(kernel, weight, config))
    return _ops.call(_ops.prepare_weights, weight, per_channel, layout)


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    qweight_scale: Tensor | None = None,
    qweight: Tensor | None = None,
    bias: Tensor | None = None,
    quant_config: BitQuantConfig | None = None,
    training: bool = False,
) -> Tensor:
    """y = float(sum_k q_x q_w) * (s_x * s_w) + bias, in training and in inference with the same bits.

    `training` alone decides the mode; arguments of the other mode are ignored. Gradients are the straight-through
    estimator's: training gives them to x, weight and bias, inference to x and bias. With int8 activations every kernel,
    device and thread count returns the same bits. With activation_granularity "per_tensor" a row's result depends on
    the rest of its batch; with "per_channel" on that row alone.

    Only backward differentiates it: forward-mode AD is refused, and the transforms of torch.func (grad, jvp, vmap and
    the others) are not supported.

    Args:
        x: (*, in_features), float32, bfloat16 or float16; also 1-D, also without rows.
        weight: Training: (out_features, in_features), float32, bfloat16 or float16.
        qweight_scale: Inference: float32; one element per_tensor, (out_features,) or (out_features, 1) per_channel.
        qweight: Inference: as prepare_weights returns it, or int8 codes (out_features, in_features), which are packed
            on every call (slow).
        bias: (out_features,), floating, or None. Added after scaling.
        quant_config: The quantization schema.
        training: Whether to quantize `weight` here, with gradients.

    Returns:
        (*, out_features), x's dtype; under autocast the autocast dtype.

    Raises:
        QuantizationError: a needed argument is None; shapes, dtypes or devices that do not fit; in inference on a CPU
            also a damaged qweight or a scale that is not finite and positive (elsewhere: every output is NaN).
        KernelNotFoundError: kernels are named and none of them covers the config.
        NotImplementedError: x, weight or bias carries a tangent of forward-mode AD.
    """
    flags = require_config(quant_config).flags
    if STATE.token:
        return _forward_registered(x, weight, qweight_scale, qweight, bias, require_config(quant_config), training)
    if training:
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
            _checks.given(" (training=True)", x=x, weight=weight)
        return _ops.train(_ops.bitlinear_train, x, weight, bias, *flags, _ops.autocast_dtype(x))
    if not (isinstance(x, Tensor) and isinstance(qweight_scale, Tensor) and isinstance(qweight, Tensor)):
        _checks.given(" (training=False)", x=x, qweight_scale=qweight_scale, qweight=qweight)
    return _ops.infer(_ops.bitlinear, x, qweight_scale, qweight, bias, *flags, _ops.autocast_dtype(x))


# ---- where registered or named kernels decide ------------------------------------------------------------------------


def _forward_registered(
    x: Tensor,
    weight: Tensor | None,
    qweight_scale: Tensor | None,
    qweight: Tensor | None,
    bias: Tensor | None,
    config: BitQuantConfig,
    training: bool,
) -> Tensor:
    if training:
        _checks.given(" (training=True)", x=x, weight=weight)
        assert weight is not None
        kernel = candidates(config, x.device.type)[0]
        if isinstance(kernel, OperatorKernel):
            return kernel.train(x, weight, bias, config)
        if kernel.has_standard_form():
            return _train_standard_form(kernel, x, weight, bias, config)
        return _train_own_form(kernel, x, weight, bias, config)
    _checks.given(" (training=False)", x=x, qweight_scale=qweight_scale, qweight=qweight)
    assert qweight_scale is not None
    assert qweight is not None
    kernel = select(config, x.device.type, qweight)
    if isinstance(kernel, OperatorKernel):
        return kernel(x, qweight_scale, qweight, bias, config)
    if kernel.has_standard_form():
        return _infer_standard_form(kernel, x, qweight_scale, qweight, bias, config)
    return _infer_own_form(kernel, x, qweight_scale, qweight, bias, config)


def _prepare_own_form(kernel: BitKernelBase, weight: Tensor, config: BitQuantConfig) -> tuple[Tensor, Tensor]:
    token = _inside_own_form.set(True)
    try:
        prepared: object = kernel.prepare_weights(weight, config)
    finally:
        _inside_own_form.reset(token)
    if isinstance(prepared, tuple) and [isinstance(part, Tensor) for part in prepared] == [True, True]:
        scale, qweight = prepared
        return scale, qweight
    what = prepared if isinstance(prepared, tuple) else (prepared,)
    parts = ", ".join(_checks.described(part) for part in what)
    raise QuantizationError(f"kernel {kernel.name}: prepare_weights returned {parts}, expected two tensors")


def _train_own_form(
    kernel: BitKernelBase, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    out_dtype = _ops.autocast_dtype(x)
    shape, _ = _checks.training(x, weight, bias, out_dtype)
    y = _call(kernel, x, *_prepare_own_form(kernel, weight, config), bias, config, shape, out_dtype)
    return _require_gradient(kernel, y, x, weight, bias)


def _infer_own_form(
    kernel: BitKernelBase, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    shape = _checks.own_form(x, bias)
    return _require_gradient(
        kernel, _call(kernel, x, scale, qweight, bias, config, shape, _ops.autocast_dtype(x)), x, bias
    )


def _train_standard_form(
    kernel: BitKernelBase, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    out_dtype = _ops.autocast_dtype(x)
    _ops.refuse_tangents(x, weight, bias)
    source, _, _, qweight, scale = _ops.call(_ops.torch_bitlinear_train, x, weight, bias, *config.flags, out_dtype)
    with torch.no_grad():
        value = _call(kernel, x, scale, qweight, bias, config, source.shape, out_dtype)
    return _ops.attach_gradient(value, source)


def _infer_standard_form(
    kernel: BitKernelBase, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    _ops.refuse_tangents(x, bias)
    out_dtype = _ops.autocast_dtype(x)
    shape, _ = _checks.inference(x, scale, qweight, bias, config.flags[0], out_dtype)
    packed = qweight if qweight.dtype == torch.uint8 else pack_weights(qweight)
    scale = _ops.call(_ops.checked_scale, scale.detach(), packed, x.shape[-1])
    with torch.no_grad():
        value = _call(kernel, x, scale, packed, bias, config, shape, out_dtype)
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return value
    source = _ops.call(_ops.torch_bitlinear, x, scale, packed, bias, *config.flags, out_dtype)
    return _ops.attach_gradient(value, source)


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
    with _ops.autocast_off(x.device.type):
        y = _checks.returned(kernel.name, kernel(x, scale, qweight, bias, config), x, shape)
    return y if out_dtype is None else y.to(out_dtype)


def _require_accepted(kernel: BitKernelBase, scale: Tensor, qweight: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel must take what it prepared: forward would hand it to another one otherwise."""
    if not kernel.accepts(qweight):
        raise QuantizationError(
            f"kernel {kernel.name} prepared a qweight of dtype {qweight.dtype} and shape {tuple(qweight.shape)} "
            "that it does not accept: override accepts"
        )
    return scale, qweight


def _require_gradient(kernel: BitKernelBase, y: Tensor, *inputs: Tensor | None) -> Tensor:
    """A kernel with a form of its own must not cut the graph silently."""
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if wanted and not y.requires_grad:
        raise QuantizationError(
            f"kernel {kernel.name} has its own prepare_weights and returned y without a gradient, "
            "but an input requires one"
        )
    return y
