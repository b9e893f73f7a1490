"""`BitModelBase`: what every model can do: save, load, deploy."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import FileError, QuantizationError
from bitlayers import BitLinear, deploy
from bitmodels.config import CONFIG_FILE, MODEL_TYPE, BitModelConfig, read_config, same_value
from bitmodels.layout import LAYOUT_FIELDS, Layout, own_ties
from bitmodels.registry import current_name
from bitmodels.storage import MODEL_FILE, plain_defaults, read_tensors, require_path, save_tensors, write_together

__all__ = ["BitModelBase", "BitModelConfig"]


class BitModelBase(nn.Module):
    """Base class of models. A subclass sets `config_class`, is decorated with `register_model`, and is built from its
    config alone, on the meta device too: there `from_pretrained` learns whether a file fits before it takes memory.

    Args:
        config: An instance of `config_class`.
        quant_config: Takes the place of `config.quant_config` where given.

    Raises:
        QuantizationError: `config` is of another class.
    """

    config_class: ClassVar[type[BitModelConfig]] = BitModelConfig
    model_type: ClassVar[str] = ""

    def __init__(self, config: BitModelConfig, quant_config: BitQuantConfig | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise QuantizationError(f"config is a {type(config).__name__}, expected a {self.config_class.__name__}")
        self.config: Any = config if quant_config is None else dataclasses.replace(config, quant_config=quant_config)

    @property
    def is_deployed(self) -> bool:
        """Whether every ternary layer holds packed weights only."""
        layers = [module for module in self.modules() if isinstance(module, BitLinear)]
        return bool(layers) and all(layer.is_deployed for layer in layers)

    def deploy(self) -> Self:
        """Packs all ternary weights for good and sets evaluation mode. Returns the model.

        Raises:
            StateError: the model is deployed already.
            QuantizationError: a weight is not finite (then nothing has changed).
        """
        deploy(self)
        return self

    def save_pretrained(self, directory: str | bytes | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into a directory, which is created where it is missing.

        Both files are written beside their places and then renamed, one right after the other. The header of
        `model.safetensors` repeats the config, so that files which do not belong together are noticed when they are
        loaded. Tensors that share memory are stored once and stay tied.

        Raises:
            QuantizationError: the class has not been registered; a tensor holds NaN or infinity, or is otherwise one
                that `from_pretrained` would refuse (its name is given). Then nothing is written.
            OSError: the directory or a file cannot be written. What was there before is still there.
        """
        if not self.model_type:
            raise QuantizationError(f"{type(self).__name__} has no model_type; decorate it with register_model")
        path = require_path(directory)
        state = self.state_dict(keep_vars=True)
        _check_parameters(self)
        _check_can_be_saved(state)
        layout = Layout.of(self, state, self.config.quant_config)
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in state.items()
            if name not in layout.tied_tensors
        }
        text = self._config_text(layout)
        self._check_loads(text, layout, tensors)
        metadata = self._metadata(self.config, layout)
        path.mkdir(parents=True, exist_ok=True)
        write_together(
            {
                path / MODEL_FILE: lambda file: save_tensors(file, tensors, metadata),
                path / CONFIG_FILE: lambda file: _write_text(file, text),
            }
        )

    @classmethod
    def from_pretrained(cls, directory: str | bytes | os.PathLike[str]) -> Self:
        """Reads what `save_pretrained` wrote, checking every byte of it.

        Returns:
            The model in evaluation mode, its layers deployed where they were deployed when they were saved, on the
            CPU, with the dtypes of the file, whatever torch's default dtype and device are. The model does not depend
            on the files any more.

        Raises:
            FileNotFoundError: a file is missing.
            FileError: a file is damaged or changes while it is read, or the two do not belong together or to this
                class; the message names the file and both values.
        """
        path = require_path(directory)
        config, layout = cls._read_config(path)
        weights = path / MODEL_FILE
        with plain_defaults():
            tensors, metadata = read_tensors(weights)
            cls._check_metadata(weights, metadata, config, layout)
            with _errors_of(weights):
                tensors = layout.complete(tensors)
                cls.check_names(config, tensors.keys())
            with _errors_of(path / CONFIG_FILE):
                model = cls._build_on_meta(config, layout)
            ties = own_ties(model)
            with _errors_of(weights):
                _load(model, tensors)
                if _has_meta_tensors(model):  # Of tensors that no file holds, such as non-persistent buffers.
                    model = cls(config)
                    layout.configure(model, config.quant_config)
                    _load(model, tensors)
                layout.tie(model, ties)
        return model.eval()

    @classmethod
    def check_names(cls, config: Any, names: Collection[str]) -> None:
        """A look at the names of a file's tensors before the model is built, for a config that would build without end.

        A subclass whose config says how many layers there are overrides it. What passes is compared tensor by tensor.

        Raises:
            QuantizationError: the config wants more than the file has.
        """

    @classmethod
    def _read_config(cls, directory: Path) -> tuple[BitModelConfig, Layout]:
        model_type, values = read_config(directory)
        path = directory / CONFIG_FILE
        if model_type != cls.model_type:
            raise FileError(f'{path}: model_type is "{model_type}", expected "{cls.model_type}"')
        with _errors_of(path):
            layout = Layout.pop_from(values)
            return cls.config_class.from_dict(values), layout

    @classmethod
    def _build_on_meta(cls, config: BitModelConfig, layout: Layout) -> Self:
        """The model without memory for its tensors."""
        try:
            with torch.device("meta"):
                model = cls(config)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch: sizes that no tensor can have.
            raise QuantizationError(f"{cls.__name__} cannot be built: {error}") from error
        layout.configure(model, config.quant_config)
        return model

    @classmethod
    def _metadata(cls, config: BitModelConfig, layout: Layout) -> dict[str, str]:
        return {"format": "pt", MODEL_TYPE: cls.model_type, **config.to_metadata(), **layout.to_metadata()}

    @classmethod
    def _check_metadata(cls, path: Path, metadata: dict[str, str], config: BitModelConfig, layout: Layout) -> None:
        """The config that the weights were saved with against ours. Files by other hands may have no metadata."""
        found = dict(metadata)
        if MODEL_TYPE in found:
            found[MODEL_TYPE] = current_name(found[MODEL_TYPE])
        expected = cls._metadata(config, layout)
        for name, value in expected.items():
            if not same_value(found.get(name, value), value):
                raise FileError(f"{path}: saved with {name}={found[name]}, {CONFIG_FILE} says {name}={value}")
        for name in found.keys() - expected.keys():
            if name.startswith("tied.") or ".quant_config." in name:
                raise FileError(f"{path}: saved with {name}={found[name]}, {CONFIG_FILE} does not have it")

    def _config_text(self, layout: Layout) -> str:
        values = self.config.to_dict()
        if taken := {MODEL_TYPE, *LAYOUT_FIELDS} & values.keys():
            raise QuantizationError(f"{type(self.config).__name__} has the fields {sorted(taken)}, which are reserved")
        try:
            text = json.dumps({MODEL_TYPE: self.model_type, **values, **layout.to_dict()}, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise QuantizationError(f"{type(self.config).__name__} does not fit into JSON: {error}") from error
        return text + "\n"

    def _check_loads(self, text: str, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """What nobody could load must not take the place of what somebody can."""
        values = json.loads(text)
        for name in (MODEL_TYPE, *LAYOUT_FIELDS):
            values.pop(name, None)
        config = self.config_class.from_dict(values)
        complete = layout.complete(tensors)
        self.check_names(config, complete.keys())
        with plain_defaults():
            _load(self._build_on_meta(config, layout), complete)


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # torch: a missing, unknown or misshapen tensor.
        raise QuantizationError(str(error)) from error


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """What is wrong while a file is read is wrong with the file."""
    try:
        yield
    except (QuantizationError, RecursionError) as error:
        raise FileError(f"{path}: {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _check_can_be_saved(state: Mapping[str, object]) -> None:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise QuantizationError(f"{name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.is_meta:
            raise QuantizationError(f"{name} is on the meta device and has no values to save")


def _check_parameters(model: nn.Module) -> None:
    """Buffers may hold infinity, as masks do; `BitLinear` checks its own."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise QuantizationError(f"{name} holds NaN or infinity")


def _has_meta_tensors(model: nn.Module) -> bool:
    """Whether a parameter, a buffer or a plain attribute of a module has no memory."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    held = chain(model.parameters(), model.buffers(), attributes)
    return any(isinstance(value, Tensor) and value.is_meta for value in held)
