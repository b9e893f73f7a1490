"""Whole models: from `nn.Linear` to `BitLinear`, and from float weights to packed ones."""

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitlayers.bitlinear import BitLinear

_LOG = logging.getLogger("bitlayers")

FilterFn = Callable[[nn.Linear, str], bool]


def convert(
    model: nn.Module,
    quant_config: BitQuantConfig | None = None,
    skip: Collection[str] | None = None,
    *,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Replaces the `nn.Linear`s of a model by `BitLinear`s with the same parameters, in place.

    Parameters are shared, not copied, so that an optimizer keeps working. Embeddings stay as they are, and so do
    subclasses of `nn.Linear` (`nn.MultiheadAttention` has nothing else, and stays float) and, unless `skip` is given,
    the output head of a language model: `lm_head`, what `model.get_output_embeddings()` returns, and layers that share
    their weight with an `nn.Embedding`.

    What was converted and what was left alone, and why, is logged by the logger "bitlayers" (level INFO);
    `summary(model)` lists it at any time.

    Args:
        model: Any module; it is changed.
        quant_config: The schema of the new layers; `BitQuantConfig()` if None.
        skip: Qualified names, as `named_modules()` gives them, or patterns of them (`"*.head"`, `"layers.[01].*"`) of
            layers, or of modules with all their layers, to leave alone. None: the output head. `()`: nothing.
        filter_fn: Called with every layer that is not skipped, and its name; those for which it returns False are left
            alone.

    Returns:
        `model`, or the new layer if `model` itself is an `nn.Linear`.

    A model that transformers loaded with ternary layers of its own (`quant_method` "bitnet") keeps its codes and
    scales: packed layers become deployed ones, those that quantize online trainable ones. Its other layers stay.

    The config of a model of transformers tells from now on which layers are ternary, so that what `save_pretrained`
    writes is what `from_pretrained` reads (see `bitlayers.transformers`).

    Raises:
        QuantizationError: `model` is no module; an entry of `skip` is no name and matches nothing in the model; a layer
            cannot be replaced (see `BitLinear.from_linear`; its name is given); the model is quantized already by
            another method of transformers than its BitNet, or by that in a way that BitLinear has not (a norm inside of
            the layer, a code 3, `quant_config` with other scales). Then nothing has changed.
    """
    if not isinstance(model, nn.Module):
        raise QuantizationError(f"model is a {type(model).__name__}, expected an nn.Module")
    skipped = _skipped(model, skip)
    if type(model) is nn.Linear:
        return BitLinear.from_linear(model, quant_config)
    integration = _integration_of(model)
    if integration is not None:
        if taken := _take_over(integration, model, quant_config, skip, filter_fn):
            _LOG.info("convert: %d ternary layers of transformers became BitLinear", len(taken))
            return model
        integration.refuse_foreign_quantization(model)
    left: dict[str, str] = {}
    places = [place for place in _places(model, "", skipped, left) if _wanted(place, filter_fn, left)]
    replacements: dict[nn.Module, BitLinear] = {}  # A layer used in two places stays one layer.
    for place in places:
        if place.linear not in replacements:
            replacements[place.linear] = _replacement(place, quant_config)
    for place in places:
        setattr(place.parent, place.name, replacements[place.linear])
    _leave_compiled_fast_paths(model)
    if integration is not None:
        integration.describe(model)
    _LOG.info("convert: %d nn.Linear became BitLinear, %d were left alone", len(places), len(left))
    for path, reason in left.items():
        _LOG.info("convert: %s was left alone: %s", path, reason)
    return model


def _take_over(
    integration: Any,
    model: nn.Module,
    quant_config: BitQuantConfig | None,
    skip: Collection[str] | None,
    filter_fn: FilterFn | None,
) -> list[str]:
    if (skip is not None or filter_fn is not None) and integration.bitnet_layers(model):
        raise QuantizationError(
            "the model has ternary layers of transformers, all of which are taken over: no skip, no filter_fn"
        )
    taken: list[str] = integration.take_over_bitnet_layers(model, quant_config)
    return taken


class _Place(NamedTuple):
    """Where a model holds an `nn.Linear`."""

    parent: nn.Module
    name: str
    path: str
    linear: nn.Linear


def _skipped(model: nn.Module, skip: Collection[str] | None) -> dict[str, str]:
    """Names of modules to leave alone, with the reason."""
    if skip is None:
        return dict.fromkeys(output_heads(model), "it is the output head")
    if isinstance(skip, str) or not all(isinstance(entry, str) for entry in skip):
        raise QuantizationError(f"skip is {skip!r}, expected a collection of names or patterns, or None")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found: dict[str, str] = {}
    unknown = []
    for entry in skip:
        matches = [name for name in names if name == entry or fnmatchcase(name, entry)]
        found |= dict.fromkeys(matches, f"skip has {entry!r}")
        if not matches:
            unknown.append(entry)
    if unknown:
        raise QuantizationError(f"skip names {sorted(unknown)}, which the model does not have")
    return found


def output_heads(model: nn.Module) -> list[str]:
    """The names of the layers that turn hidden states into logits of a vocabulary."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", None)  # transformers' models have it.
    head = find_head() if callable(find_head) else None
    return [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
        and (module is head or path.rpartition(".")[2] == "lm_head" or id(module.weight) in embeddings)
    ]


def _places(module: nn.Module, prefix: str, skipped: dict[str, str], left: dict[str, str]) -> Iterator[_Place]:
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if child is None:
            continue
        if path in skipped:
            left |= {
                f"{path}.{inner}".rstrip("."): skipped[path]
                for inner, part in child.named_modules()
                if isinstance(part, nn.Linear) and not isinstance(part, BitLinear)
            }
        elif type(child) is nn.Linear:
            yield _Place(module, name, path, child)
        else:
            if isinstance(child, nn.Linear) and not isinstance(child, BitLinear):
                left[path] = f"it is a {type(child).__name__}, a subclass of nn.Linear"
            yield from _places(child, f"{path}.", skipped, left)


def _wanted(place: _Place, filter_fn: FilterFn | None, left: dict[str, str]) -> bool:
    if filter_fn is None or filter_fn(place.linear, place.path):
        return True
    left[place.path] = "filter_fn returned False"
    return False


def _replacement(place: _Place, quant_config: BitQuantConfig | None) -> BitLinear:
    try:
        return BitLinear.from_linear(place.linear, quant_config)
    except QuantizationError as error:
        raise QuantizationError(f"{place.path}: {error}") from error


def _leave_compiled_fast_paths(model: nn.Module) -> None:
    """Keeps torch's encoders from their fast paths in compiled code, where a layer cannot see who reads its weight."""
    for module in model.modules():
        if not any(isinstance(part, BitLinear) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "Neither", which has no fast path.
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def deploy(model: nn.Module) -> nn.Module:
    """Deploys every `BitLinear` of a model that is not deployed yet, and sets the model to evaluation mode.

    All weights are prepared before the first layer changes: if one cannot be, the model stays as it was.

    Returns:
        `model`.

    Raises:
        StateError: every BitLinear is deployed already.
        QuantizationError: `model` is no module or has no BitLinear; a weight is not finite (its name is given).
    """
    if not isinstance(model, nn.Module):
        raise QuantizationError(f"model is a {type(model).__name__}, expected an nn.Module")
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
    integration = _integration_of(model)
    if integration is not None:
        integration.describe_deployed(model)
    return model


def _integration_of(model: nn.Module) -> Any:
    """`bitlayers.transformers.models` if the module holds a model of transformers, whose config tells which layers are
    ternary. Without one transformers is not imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)  # Missing while transformers is being imported.
    if kind is None or not any(isinstance(module, kind) for module in model.modules()):
        return None
    return import_module("bitlayers.transformers.models")
