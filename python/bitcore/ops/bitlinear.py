"""The ternary linear layer: prepare_weights and forward."""

from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.config_keyword import either_config_name
from bitcore.kernels import registry
from bitcore.operators import checks, native
from bitcore.ops.packing import check_qweight, pack_weights, repack, unpack_weights

__all__ = ["check_qweight", "forward", "pack_weights", "prepare_weights", "repack", "unpack_weights"]


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
        qweight_scale, float32: () per_tensor, (out_features,) per_channel; float16 per_group: (out_features,
        ceil(in_features / group_size)); and qweight: uint8 (out_features, R + T), R = 4 * ceil(in_features / 16),
        T = ceil(64 / out_features), or what a registered kernel's own prepare_weights returns.

    Raises:
        QuantizationError: wrong rank or dtype, a NaN or an infinity in the weight, a group whose mean magnitude float16
            cannot hold (above 65,504), an unknown layout.
        KernelNotFoundError: kernels are named and none of them covers the config.
    """
    config = require_config(config)
    weight = native.detached("weight", weight)
    if registry.selection():
        return registry.candidates(config, weight.device.type)[0].prepare(weight, config, layout)
    return native.call(native.prepare_weights, weight, config.flags[0], layout, config.weight_group_size)


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

    With weights per_group: y = bias + the float32 sum, over the groups in order, of that product for each group.

    `training` alone decides the mode; arguments of the other mode are ignored. Gradients are the straight-through
    estimator's: training gives them to x, weight and bias, inference to x and bias. With int8 activations every kernel,
    device and thread count returns the same bits. With activation_granularity "per_tensor" a row's result depends on
    the rest of its batch; with "per_channel" on that row alone.

    Only backward differentiates it: forward-mode AD is refused, and the transforms of torch.func (grad, jvp, vmap and
    the others) are not supported.

    Args:
        x: (*, in_features), float32, bfloat16 or float16; also 1-D, also without rows.
        weight: Training: (out_features, in_features), float32, bfloat16 or float16.
        qweight_scale: Inference: float32; one element per_tensor, (out_features,) or (out_features, 1) per_channel;
            float16 (out_features, ceil(in_features / group_size)) per_group.
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
    config = require_config(quant_config)
    if training:
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
            checks.given(" (training=True)", x=x, weight=weight)
        if registry.selection():
            assert weight is not None
            return registry.candidates(config, x.device.type)[0].train(x, weight, bias, config)
        rest = config.operator_arguments(native.autocast_dtype(x))
        return native.train(native.bitlinear_train, x, weight, bias, *rest)
    if not (isinstance(x, Tensor) and isinstance(qweight_scale, Tensor) and isinstance(qweight, Tensor)):
        checks.given(" (training=False)", x=x, qweight_scale=qweight_scale, qweight=qweight)
    if registry.selection():
        assert qweight_scale is not None
        assert qweight is not None
        return registry.select(config, x.device.type, qweight).infer(x, qweight_scale, qweight, bias, config)
    rest = config.operator_arguments(native.autocast_dtype(x))
    return native.infer(native.bitlinear, x, qweight_scale, qweight, bias, *rest)
