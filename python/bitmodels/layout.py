"""What a saved model is besides its config and its tensors: layers with configs of their own, and tied tensors."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear
from bitmodels.config import numbers_of_fields

_QUANT_FIELDS = tuple(field.name for field in dataclasses.fields(BitQuantConfig))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The entries of config.json beside the config's fields.

    Args:
        module_configs: Of every ternary layer whose config is not the model's: the fields that differ. None in files of
            earlier versions, for which the model's constructor knows.
        tied_tensors: Of every tensor that shares the memory of another: that other's name, under which it is stored.
    """

    module_configs: dict[str, dict[str, Any]] | None = None
    tied_tensors: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, state: Mapping[str, Tensor], quant_config: BitQuantConfig) -> Self:
        """Of a model whose `state_dict(keep_vars=True)` is `state`."""
        differing = {
            name: layer.quant_config.fields_unlike(quant_config)
            for name, layer in _ternary_layers(model)
            if layer.quant_config != quant_config
        }
        return cls(differing, _ties(state))

    @classmethod
    def pop_from(cls, values: dict[str, Any]) -> Self:
        """Takes the entries out of a config.json's values.

        Raises:
            QuantizationError: one is not what `to_dict()` gives.
        """
        found = {name: values.pop(name) for name in LAYOUT_FIELDS if name in values}
        configs, ties = found.get("module_configs"), found.get("tied_tensors", {})
        if configs is not None and not _is_object_of(configs, dict):
            raise QuantizationError(f"module_configs is {configs!r}, expected an object of objects")
        for name, fields in (configs or {}).items():
            if unknown := set(fields) - set(_QUANT_FIELDS):
                raise QuantizationError(f"module_configs of {name} has {sorted(unknown)}, known are {_QUANT_FIELDS}")
        if not _is_object_of(ties, str):
            raise QuantizationError(f"tied_tensors is {ties!r}, expected an object of names")
        return cls(configs, ties)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds of it."""
        ties = {"tied_tensors": self.tied_tensors} if self.tied_tensors else {}
        return {"module_configs": self.module_configs or {}, **ties}

    def to_metadata(self) -> dict[str, str]:
        """Flat and textual: `layers.1.quant_config.activation_dtype`, `tied.layers.2.weight`."""
        flat = {
            f"{name}.quant_config.{field}": str(value)
            for name, fields in (self.module_configs or {}).items()
            for field, value in fields.items()
        }
        return flat | {f"tied.{name}": stored for name, stored in self.tied_tensors.items()}

    def configure(self, model: nn.Module, quant_config: BitQuantConfig) -> None:
        """Gives every ternary layer the config that it was saved with.

        Raises:
            QuantizationError: a name that is no layer of the model, a value that does not exist.
        """
        if self.module_configs is None:
            return
        layers = dict(_ternary_layers(model))
        if unknown := set(self.module_configs) - set(layers):
            raise QuantizationError(f"module_configs names {sorted(unknown)}, which are no ternary layers of the model")
        for name, layer in layers.items():
            fields = numbers_of_fields(BitQuantConfig, self.module_configs.get(name, {}))
            layer.quant_config = quant_config.with_fields(fields)

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the model: those that are stored, and those that are tied to them.

        Raises:
            QuantizationError: a tensor is tied to one that is not stored.
        """
        missing = sorted(set(self.tied_tensors.values()) - set(tensors))
        if missing:
            raise QuantizationError(f"tied_tensors names {missing}, which the file does not hold")
        return {**tensors, **{name: tensors[stored] for name, stored in self.tied_tensors.items()}}

    def tie(self, model: nn.Module, own: Mapping[str, str]) -> None:
        """Makes one tensor of those that were one.

        Args:
            model: It holds the loaded tensors.
            own: Ties that the model's constructor makes; files of earlier versions hold both values.
        """
        ties = dict(self.tied_tensors)
        state = model.state_dict(keep_vars=True)
        for name, first in own.items():
            if name in state and first in state and torch.equal(state[name], state[first]):
                ties.setdefault(name, first)
        for name, first in ties.items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = model.state_dict(keep_vars=True)[first]


LAYOUT_FIELDS = tuple(field.name for field in dataclasses.fields(Layout))


def _is_object_of(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def own_ties(model: nn.Module) -> dict[str, str]:
    """The names of a new model's tensors that are the same object as an earlier one. Works on the meta device."""
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: other for name, other in ties.items() if name != other}


def _ternary_layers(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Under every name that a layer has: a loaded model may hold two layers where one stood in two places."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BitLinear):
            yield name, module


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[object, str] = {}
    ties = {name: first.setdefault(_memory(tensor), name) for name, tensor in state.items()}
    return {name: other for name, other in ties.items() if name != other}


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that show the same memory in the same way."""
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
