"""What `convert()` and `deploy()` do to a model of transformers besides its layers."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers.bitlinear import BitLinear
from bitlayers.transformers.bitnet import bitnet_layers, replacements, unpacks_bitnet
from bitlayers.transformers.config import METHOD, BitLabConfig
from bitlayers.transformers.quantizer import BitLabQuantizer, mark_as_quantized, unmark


def take_over_bitnet_layers(module: nn.Module, quant_config: BitQuantConfig | None) -> list[str]:
    """Replaces the ternary layers of transformers' own BitNet by BitLinears with the same weights.

    Returns:
        The names of the layers; none where there are no such layers.

    Raises:
        QuantizationError: a layer that BitLinear cannot be. Then nothing has changed.
    """
    layers = bitnet_layers(module)
    for name, layer in replacements(layers, quant_config).items():
        module.set_submodule(name, layer)
    if not layers:
        return []
    for model in _outermost(module):
        if hasattr(model, "hf_quantizer") and not isinstance(model.hf_quantizer, BitLabQuantizer):
            unmark(model)
        # What unpacked the weights on loading cannot be undone on saving, and need not be.
        conversions: list[Any] = getattr(model, "_weight_conversions", None) or []
        conversions[:] = [one for one in conversions if not unpacks_bitnet(one)]
    describe(module)
    describe_deployed(module)
    return list(layers)


def refuse_foreign_quantization(module: nn.Module) -> None:
    """Refuses models whose weights another method has quantized.

    Raises:
        QuantizationError
    """
    for model in _outermost(module):
        config = getattr(model.config, "quantization_config", None)
        if config is None or isinstance(config, BitLabConfig):
            continue
        method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
        if method != METHOD:
            raise QuantizationError(
                f"the model is quantized by {getattr(method, 'value', method)!r}, expected float weights"
            )


def describe(module: nn.Module) -> None:
    """Makes the models' configs say which layers are ternary, from now on."""
    for model in _outermost(module):
        if any(isinstance(part, BitLinear) for part in model.modules()):
            _config_of(model)


def describe_deployed(module: nn.Module) -> None:
    """As `describe`, and tells transformers that the weights are packed."""
    for model in _outermost(module):
        if any(isinstance(part, BitLinear) and part.is_deployed for part in model.modules()):
            config = _config_of(model)
            if not isinstance(getattr(model, "hf_quantizer", None), BitLabQuantizer):
                mark_as_quantized(model, BitLabQuantizer(config))


def _config_of(model: PreTrainedModel) -> BitLabConfig:
    """The config of a model with ternary layers, which describes it, or the whole that it is a part of."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitLabConfig):
        model.config.quantization_config = config = BitLabConfig.of(model)
    elif not config.describes(model):
        config.follow(model)
    return config


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module, without those inside of others."""
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside |= set(map(id, module.modules()))
    return found
