"""Whole models: from `nn.Linear` to `BitLinear`, and from float weights to packed ones."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitlayers.bitlinear import BitLinear


def convert(model: nn.Module, quant_config: BitQuantConfig | None = None, skip: Collection[str] = ()) -> nn.Module:
    """Replaces every `nn.Linear` in a model by a `BitLinear` with the same parameters, in place.

    Parameters are shared, not copied, so that an optimizer keeps working. Subclasses of `nn.Linear` stay as they are;
    `nn.MultiheadAttention` has nothing else, and so stays float. `nn.TransformerEncoderLayer` and
    `nn.TransformerEncoder` lose torch's fast path of evaluation, which reads the float weights past their layers.

    Args:
        model: Any module; it is changed.
        quant_config: The schema of the new layers; `BitQuantConfig()` where None.
        skip: Qualified names, as `named_modules()` gives them, of layers (or of modules with all their layers) to
            leave alone, for example `["head"]`.

    Returns:
        `model`, or the new layer where `model` itself is an `nn.Linear`.

    Raises:
        QuantizationError: a name in `skip` does not exist in the model; a layer cannot be replaced (see
            `BitLinear.from_linear`; its name is given). Then nothing has changed.
    """
    unknown = set(skip) - {name for name, _ in model.named_modules()}
    if unknown:
        raise QuantizationError(f"skip names {sorted(unknown)}, which the model does not have")
    if type(model) is nn.Linear:
        return BitLinear.from_linear(model, quant_config)
    places = list(_places(model, "", frozenset(skip)))
    replacements: dict[nn.Module, BitLinear] = {}  # A layer used in two places stays one layer.
    for place in places:
        if place.linear not in replacements:
            replacements[place.linear] = _replacement(place, quant_config)
    for place in places:
        setattr(place.parent, place.name, replacements[place.linear])
    _leave_fast_paths(model)
    return model


class _Place(NamedTuple):
    """Where a model holds an `nn.Linear`."""

    parent: nn.Module
    name: str
    path: str
    linear: nn.Linear


def _places(module: nn.Module, prefix: str, skip: frozenset[str]) -> Iterator[_Place]:
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if child is None or path in skip:
            continue
        if type(child) is nn.Linear:
            yield _Place(module, name, path, child)
        else:
            yield from _places(child, f"{path}.", skip)


def _replacement(place: _Place, quant_config: BitQuantConfig | None) -> BitLinear:
    try:
        return BitLinear.from_linear(place.linear, quant_config)
    except QuantizationError as error:
        raise QuantizationError(f"{place.path}: {error}") from error


def _leave_fast_paths(model: nn.Module) -> None:
    """Keeps torch's encoders from computing with the float weights of ternary layers."""
    for module in model.modules():
        if not any(isinstance(part, BitLinear) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "Neither", which has no fast path.
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def deploy(model: nn.Module) -> nn.Module:
    """Deploys every `BitLinear` of a model that is not deployed yet, and sets the model to evaluation mode.

    All weights are prepared before the first layer changes: where one cannot be, the model stays as it was.

    Returns:
        `model`.

    Raises:
        StateError: every BitLinear is deployed already.
        QuantizationError: there is no BitLinear; a weight is not finite (its name is given).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    remaining = {name: layer for name, layer in layers.items() if not layer.is_deployed}
    if not layers:
        raise QuantizationError("deploy: the model has no BitLinear")
    if not remaining:
        raise StateError("deploy: the model is deployed already")
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
