"""Scales, quantization and its inverse, by BitNet b1.58's formulas (arXiv 2402.17764).

Every quotient is a correctly rounded float32 division, every rounding is half to even; bfloat16 and float16 tensors are
widened to float32 first. All functions take tensors on any device and raise QuantizationError for a shape, dtype or
device that does not fit.
"""

from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.config_keyword import either_config_name
from bitcore.operators import checks, native
from bitcore.ops.packing import check_qweight, pack_weights, repack, unpack_weights

__all__ = [
    "check_qweight",
    "compute_weight_scale",
    "compute_x_scale",
    "dequantize_weight",
    "dequantize_x",
    "fake_quantize_weight",
    "fake_quantize_x",
    "pack_weights",
    "quantize_weight",
    "quantize_x",
    "repack",
    "unpack_weights",
]


@either_config_name
def compute_weight_scale(weight: Tensor, config: BitQuantConfig) -> Tensor:
    """The absmean scale `max(mean(|weight|), 1e-5)`, summed in float64 in one fixed order. Carries no gradient.

    Of a group: `max(mean, 2**-14)`, rounded to float16.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16.
        config: Its weight_granularity decides the scale's shape.

    Returns:
        float32: () per_tensor, (out_features,) per_channel; float16: (out_features, ceil(in_features / group_size))
        per_group. NaN where a covered weight is NaN or infinite, or a group's mean above 65,504.

    Raises:
        QuantizationError: wrong rank or dtype.
    """
    config = require_config(config)
    return native.call(
        native.compute_weight_scale, native.detached("weight", weight), config.flags[0], config.weight_group_size
    )


@either_config_name
def quantize_weight(weight: Tensor, scale: Tensor, quant_config: BitQuantConfig) -> Tensor:
    """Ternary codes `clamp(round(weight / scale), -1, 1)`; 0 where the quotient is NaN. Carries no gradient.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16.
        scale: float32; any one-element tensor per_tensor, (out_features,) or (out_features, 1) per_channel; float16
            (out_features, ceil(in_features / group_size)) per_group.
        quant_config: Its weight_granularity and group_size.

    Returns:
        int8 (out_features, in_features) of -1, 0, 1.

    Raises:
        QuantizationError: wrong rank, dtype, device or shape of the scale.
    """
    config = require_config(quant_config)
    checks.given(weight=weight, scale=scale)
    return native.call(native.quantize_weight, weight, scale, config.flags[0], config.weight_group_size)


@either_config_name
def dequantize_weight(qweight: Tensor, scale: Tensor, quant_config: BitQuantConfig) -> Tensor:
    """`qweight * scale`. Carries no gradient.

    Args:
        qweight: int8 (out_features, in_features), as quantize_weight and unpack_weights return it.
        scale: As in quantize_weight.
        quant_config: Its weight_granularity.

    Returns:
        float32 (out_features, in_features).

    Raises:
        QuantizationError: qweight is packed (unpack it with unpack_weights first), or as quantize_weight.
    """
    config = require_config(quant_config)
    checks.given(qweight=qweight)
    scale = native.detached("scale", scale)
    return native.call(native.dequantize_weight, qweight, scale, config.flags[0], config.weight_group_size)


@either_config_name
def compute_x_scale(x: Tensor, config: BitQuantConfig) -> Tensor:
    """The absmax scale of activations, `max(max(|x|), 1e-5) / 127`. Carries no gradient.

    Args:
        x: (*, in_features), float32, bfloat16 or float16.
        config: Its activation_granularity decides the scale's shape. float32 activations are not quantized: 1.

    Returns:
        float32: () per_tensor, (*, 1) per_channel, (*, ceil(in_features / group_size)) per_group; NaN where a covered
        element is NaN or infinite.

    Raises:
        QuantizationError: wrong rank or dtype.
    """
    _, int8_activations, per_channel = require_config(config).flags
    x = native.detached("x", x)
    return native.call(native.compute_x_scale, x, int8_activations, per_channel, config.x_group_size)


@either_config_name
def quantize_x(x: Tensor, scale: Tensor, quant_config: BitQuantConfig) -> Tensor:
    """Activation codes `clamp(round(x / scale), -128, 127)`; 0 where the quotient is NaN. They carry no gradient.

    Args:
        x: (*, in_features), float32, bfloat16 or float16.
        scale: float32; any one-element tensor per_tensor, (*, 1) per_channel, (*, ceil(in_features / group_size))
            per_group.
        quant_config: Its activation_dtype and activation_granularity.

    Returns:
        int8 of x's shape; where activations are float32 x itself, detached if it requires a gradient.

    Raises:
        QuantizationError: wrong rank, dtype, device or shape of the scale.
    """
    _, int8_activations, per_channel = require_config(quant_config).flags
    checks.given(x=x, scale=scale)
    if not int8_activations:
        checks.x_and_scale(x, scale, per_channel)
        return x.detach() if x.requires_grad else x
    return native.call(native.quantize_x, x, scale, per_channel, quant_config.x_group_size)


@either_config_name
def dequantize_x(qx: Tensor, scale: Tensor, quant_config: BitQuantConfig) -> Tensor:
    """`qx * scale`. Carries no gradient.

    Args:
        qx: int8 (*, in_features); float32, bfloat16 or float16 where activations are float32.
        scale: As in quantize_x.
        quant_config: Its activation_dtype and activation_granularity.

    Returns:
        float32 of qx's shape.

    Raises:
        QuantizationError: wrong rank, dtype, device or shape of the scale.
    """
    _, int8_activations, per_channel = require_config(quant_config).flags
    qx, scale = native.detached("qx", qx), native.detached("scale", scale)
    if not int8_activations:
        checks.x_and_scale(qx, scale, per_channel, name="qx")
        return qx.float() * (scale if per_channel else scale.reshape(()))
    return native.call(native.dequantize_x, qx, scale, per_channel, quant_config.x_group_size)


@either_config_name
def fake_quantize_weight(weight: Tensor, config: BitQuantConfig) -> Tensor:
    """The weight that the layer multiplies by, `dequantize(quantize(weight))`, with the straight-through gradient.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16.
        config: Its weight_granularity.

    Returns:
        float32 (out_features, in_features). Its gradient passes to weight unchanged.

    Raises:
        QuantizationError: wrong rank or dtype.
        NotImplementedError: weight carries a tangent of forward-mode AD.
    """
    native.refuse_tangents(weight)
    scale = compute_weight_scale(weight, config)
    codes = quantize_weight(weight, scale, config)
    return native.call(native.attach_gradient, dequantize_weight(codes, scale, config), weight)


@either_config_name
def fake_quantize_x(x: Tensor, config: BitQuantConfig) -> Tensor:
    """The activations that the layer multiplies, `dequantize(quantize(x))`, with the straight-through gradient.

    Args:
        x: (*, in_features), float32, bfloat16 or float16.
        config: Its activation_dtype and activation_granularity.

    Returns:
        float32 of x's shape; x itself where activations are float32. Its gradient passes to x unchanged.

    Raises:
        QuantizationError: wrong rank or dtype.
        NotImplementedError: x carries a tangent of forward-mode AD, and activations are int8.
    """
    scale = compute_x_scale(x, config)
    if config.activation_dtype == "float32":
        return x
    native.refuse_tangents(x)
    return native.call(native.attach_gradient, dequantize_x(quantize_x(x, scale, config), scale, config), x)
