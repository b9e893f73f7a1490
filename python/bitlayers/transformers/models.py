"""What `convert()` and `deploy()` do to a model of transformers besides its layers."""

from torch import nn
from transformers import PreTrainedModel

from bitcore.exceptions import QuantizationError
from bitlayers.bitlinear import BitLinear
from bitlayers.transformers.config import METHOD, BitLabConfig
from bitlayers.transformers.quantizer import BitLabQuantizer, mark_as_quantized


def refuse_foreign_quantization(model: PreTrainedModel) -> None:
    """Refuses a model whose weights another method has quantized.

    Raises:
        QuantizationError
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None or isinstance(config, BitLabConfig):
        return
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    if method != METHOD:
        raise QuantizationError(
            f"the model is quantized by {getattr(method, 'value', method)!r}, expected float weights"
        )


def describe(model: PreTrainedModel) -> None:
    """Makes the model's config say which layers are ternary, from now on."""
    if not any(isinstance(module, BitLinear) for module in model.modules()):
        return
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitLabConfig):
        model.config.quantization_config = BitLabConfig.of(model)
    elif not config.describes(model):
        config.follow(model)


def describe_deployed(model: PreTrainedModel) -> None:
    """As `describe`, and tells transformers that the weights are packed."""
    describe(model)
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, BitLabConfig) and not isinstance(getattr(model, "hf_quantizer", None), BitLabQuantizer):
        mark_as_quantized(model, BitLabQuantizer(config))


def outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module, without those inside of others."""
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside |= set(map(id, module.modules()))
    return found
