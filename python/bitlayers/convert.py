"""Whole models: from `nn.Linear` to `BitLinear`, and from float weights to packed ones."""

from collections.abc import Collection

from torch import nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers.bitlinear import BitLinear


def convert(model: nn.Module, quant_config: BitQuantConfig | None = None, skip: Collection[str] = ()) -> nn.Module:
    """Replaces every `nn.Linear` in a model by a `BitLinear` with the same parameters, in place.

    Parameters are shared, not copied, so that an optimizer keeps working. Subclasses of `nn.Linear` stay as they are.

    Args:
        model: Any module; it is changed.
        quant_config: The schema of the new layers; `BitQuantConfig()` where None.
        skip: Qualified names, as `named_modules()` gives them, of layers (or of modules with all their layers) to
            leave alone, for example `["head"]`.

    Returns:
        `model`, or the new layer where `model` itself is an `nn.Linear`.

    Raises:
        QuantizationError: a name in `skip` does not exist in the model.
    """
    unknown = set(skip) - {name for name, _ in model.named_modules()}
    if unknown:
        raise QuantizationError(f"skip names {sorted(unknown)}, which the model does not have")
    if type(model) is nn.Linear:
        return BitLinear.from_linear(model, quant_config)
    replacements: dict[nn.Module, BitLinear] = {}  # A layer used in two places stays one layer.
    _convert_children(model, "", quant_config, frozenset(skip), replacements)
    return model


def _convert_children(
    module: nn.Module,
    prefix: str,
    quant_config: BitQuantConfig | None,
    skip: frozenset[str],
    replacements: dict[nn.Module, BitLinear],
) -> None:
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if child is None or path in skip:
            continue
        if type(child) is nn.Linear:
            if child not in replacements:
                replacements[child] = BitLinear.from_linear(child, quant_config)
            setattr(module, name, replacements[child])
        else:
            _convert_children(child, f"{path}.", quant_config, skip, replacements)


def deploy(model: nn.Module) -> nn.Module:
    """Deploys every `BitLinear` of a model that is not deployed yet, and sets the model to evaluation mode.

    All weights are prepared before the first layer changes: where one cannot be, the model stays as it was.

    Returns:
        `model`.

    Raises:
        QuantizationError: there is no layer left to deploy; a weight is not finite (its name is given).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    remaining = {name: layer for name, layer in layers.items() if not layer.is_deployed}
    if not remaining:
        raise QuantizationError("deploy: the model is deployed already" if layers else "deploy: no BitLinear to deploy")
    prepared = []
    for name, layer in remaining.items():
        try:
            prepared.append((layer, layer.prepare_deployment()))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
    for layer, weights in prepared:
        layer._become_deployed(*weights)
    model.eval()
    return model
