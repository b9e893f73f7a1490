"""The ternary linear layer: prepare_weights and forward."""

from contextvars import ContextVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.kernels.registry import STATE, candidates, select
from bitcore.ops import _checks, _ops
from bitcore.ops.packing import check_qweight, pack_weights, repack, unpack_weights

__all__ = ["check_qweight", "forward", "pack_weights", "prepare_weights", "repack", "unpack_weights"]

# Set while a registered kernel prepares weights in a form of its own: what it calls from there is the standard form.
_inside_own_form: ContextVar[bool] = ContextVar("inside_own_form", default=False)


def prepare_weights(weight: Tensor, config: BitQuantConfig, layout: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantizes and packs a weight for inference. Carries no gradient. On a GPU it synchronizes.

    Already ternary floats do not come back: their mean magnitude, the scale, is smaller than their magnitude. Pack
    codes with pack_weights and keep their magnitude as the scale instead.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16; finite.
        config: The quantization schema.
        layout: Of the packed bytes: "auto" (a fixed rule of the shape) or "2bit".

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
            return _prepare_own_form(kernel, weight, config)
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
    """
    flags = require_config(quant_config).flags
    if STATE.token:
        return _forward_registered(x, weight, qweight_scale, qweight, bias, require_config(quant_config), training)
    if training:
        _checks.given(" (training=True)", x=x, weight=weight)
        return _ops.call(_ops.bitlinear_train, x, weight, bias, *flags, _ops.autocast_dtype(x))[0]
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
        own_scale, own_qweight = _prepare_own_form(kernel, weight, config)
        return _require_gradient(kernel, kernel(x, own_scale, own_qweight, bias, config), x, weight, bias)
    _checks.given(" (training=False)", x=x, qweight_scale=qweight_scale, qweight=qweight)
    assert qweight_scale is not None
    assert qweight is not None
    kernel = select(config, x.device.type, qweight)
    if isinstance(kernel, OperatorKernel):
        return kernel(x, qweight_scale, qweight, bias, config)
    if kernel.has_standard_form():
        return _infer_standard_form(kernel, x, qweight_scale, qweight, bias, config)
    return _require_gradient(kernel, kernel(x, qweight_scale, qweight, bias, config), x, bias)


def _prepare_own_form(kernel: BitKernelBase, weight: Tensor, config: BitQuantConfig) -> tuple[Tensor, Tensor]:
    token = _inside_own_form.set(True)
    try:
        return kernel.prepare_weights(weight, config)
    finally:
        _inside_own_form.reset(token)


def _train_standard_form(
    kernel: BitKernelBase, x: Tensor, weight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    dtype = _ops.autocast_dtype(x)
    source, _, _, qweight, scale = _ops.call(_ops.torch_bitlinear_train, x, weight, bias, *config.flags, dtype)
    return _ops.attach_gradient(_value(kernel, x, scale, qweight, bias, config, dtype), source)


def _infer_standard_form(
    kernel: BitKernelBase, x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor | None, config: BitQuantConfig
) -> Tensor:
    dtype = _ops.autocast_dtype(x)
    _checks.inference(x, scale, qweight, bias, config.flags[0], dtype)
    packed = qweight if qweight.dtype == torch.uint8 else pack_weights(qweight)
    value = _value(kernel, x, scale, packed, bias, config, dtype)
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return value
    source = _ops.call(_ops.torch_bitlinear, x, scale, packed, bias, *config.flags, dtype)
    return _ops.attach_gradient(value, source)


def _value(
    kernel: BitKernelBase,
    x: Tensor,
    scale: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    config: BitQuantConfig,
    dtype: torch.dtype | None,
) -> Tensor:
    """What the kernel returns, without a graph, rounded once to the autocast dtype where there is one."""
    with torch.no_grad(), _ops.autocast_off(x.device.type):
        if dtype is None:
            return kernel(x, scale, qweight, bias, config)
        return kernel(x.float(), scale, qweight, bias, config).to(dtype)


def _require_gradient(kernel: BitKernelBase, y: Tensor, *inputs: Tensor | None) -> Tensor:
    """A kernel with a form of its own must not cut the graph silently."""
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if wanted and not y.requires_grad:
        raise QuantizationError(
            f"kernel {kernel.name} has its own prepare_weights and returned y without a gradient, "
            "but an input requires one"
        )
    return y
