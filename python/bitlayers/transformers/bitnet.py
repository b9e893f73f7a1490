"""Models that transformers loaded with its own BitNet layers: the same codes and scales in BitLinear.

There are two conventions. A packed `BitLinear` stores a scale that divides, one over the mean magnitude; an
`AutoBitLinear` one that multiplies, or, "online", the float weights that it quantizes in every forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear, BitNetDeserialize
from transformers.integrations.bitnet import BitLinear as PackedBitLinear

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops.packing import pack_weights
from bitlayers.bitlinear import BitLinear, require_no_hooks

CODES_PER_BYTE = 4


def bitnet_layers(model: nn.Module) -> dict[str, nn.Module]:
    """transformers' own ternary layers in a model, by their names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AutoBitLinear | PackedBitLinear)
    }


def replacements(layers: dict[str, nn.Module], quant_config: BitQuantConfig | None) -> dict[str, BitLinear]:
    """A BitLinear for each: deployed, with the codes and the scale that it has, or trainable, with its float weight.

    A layer that is used in two places stays one layer.

    Raises:
        QuantizationError: a layer that BitLinear cannot be; its name is given.
    """
    config = BitQuantConfig() if quant_config is None else quant_config
    made: dict[nn.Module, BitLinear] = {}
    for name, layer in layers.items():
        if layer in made:
            continue
        try:
            made[layer] = _replacement(layer, config)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
    return {name: made[layer] for name, layer in layers.items()}


def unpacks_bitnet(conversion: object) -> bool:
    """Whether one of the conversions that transformers applies to a checkpoint's tensors unpacks ternary codes."""
    return any(isinstance(step, BitNetDeserialize) for step in getattr(conversion, "operations", ()))


def _replacement(layer: Any, config: BitQuantConfig) -> BitLinear:
    if layer.rms_norm is not None:
        raise QuantizationError("the layer has an RMSNorm of its own (use_rms_norm), which BitLinear has not")
    if isinstance(layer, AutoBitLinear) and layer.online_quant:
        return BitLinear.from_linear(layer, config)
    if config.weight_granularity != "per_tensor":
        raise QuantizationError(
            f'quant_config has weight_granularity "{config.weight_granularity}", expected "per_tensor": '
            "the layer is quantized already, with one scale"
        )
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        raise QuantizationError("its tensors are not in memory (offloaded, or on the meta device)")
    require_no_hooks(layer)
    with torch.inference_mode(False), torch.no_grad():  # Autograd may have to save what is made here.
        bias = None if layer.bias is None else layer.bias.clone()
        if isinstance(layer, AutoBitLinear):
            scale = _checked_scale(layer.weight_scale)
            bias = None if bias is None else (bias.float() * scale).to(bias.dtype)
            return _deployed(_ternary_codes(layer.weight), scale, bias, config)
        scale = _checked_scale(1.0 / _checked_scale(layer.weight_scale))
        return _deployed(_unpacked_codes(layer.weight, layer.out_features), scale, bias, config)


def _deployed(codes: Tensor, scale: Tensor, bias: Tensor | None, config: BitQuantConfig) -> BitLinear:
    out_features, in_features = codes.shape
    layer = BitLinear(in_features, out_features, bias is not None, quant_config=config, device="meta")
    layer._become_deployed(scale, pack_weights(codes))
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer.eval()


def _checked_scale(scale: Tensor) -> Tensor:
    """The one scale of a layer, float32 of shape (), in memory of its own."""
    if scale.numel() != 1:
        raise QuantizationError(f"weight_scale has shape {tuple(scale.shape)}, expected one element")
    value = scale.clone().float().reshape(())
    if not bool(torch.isfinite(value) & (value > 0)):
        raise QuantizationError(f"weight_scale is {float(value)}, expected a finite positive number")
    return value


def _ternary_codes(weight: Tensor) -> Tensor:
    others = int(((weight != 0) & (weight.abs() != 1)).sum())
    if others:
        raise QuantizationError(f"weight has {others} elements that are not -1, 0 or 1")
    return weight.to(torch.int8)


def _unpacked_codes(packed: Tensor, out_features: int) -> Tensor:
    """Row r of R packed rows holds rows r, R + r, 2 R + r and 3 R + r of the weight, two bits each, lowest first."""
    if packed.shape[0] * CODES_PER_BYTE != out_features:
        raise QuantizationError(
            f"weight has {packed.shape[0]} packed rows, which are {packed.shape[0] * CODES_PER_BYTE} of the layer's "
            f"{out_features}: transformers drops the others"
        )
    codes = torch.cat([packed >> 2 * place & 3 for place in range(CODES_PER_BYTE)])
    if invalid := int((codes == 3).sum()):
        raise QuantizationError(f"weight has {invalid} codes 3, expected 0, 1 and 2")
    return codes.to(torch.int8) - 1
