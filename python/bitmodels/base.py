"""`BitModelBase`: what every model can do: save, load, deploy."""

import dataclasses
import json
import os
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear, deploy
from bitmodels.config import CONFIG_FILE, MODEL_TYPE, BitModelConfig, read_config
from bitmodels.storage import MODEL_FILE, read_tensors, write_tensors, write_text

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

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into a directory, which is created where it is missing.

        Each file is written beside its place and then renamed. The header of `model.safetensors` repeats the config.

        Raises:
            QuantizationError: the class has not been registered.
        """
        if not self.model_type:
            raise QuantizationError(f"{type(self).__name__} has no model_type; decorate it with register_model")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / MODEL_FILE, self.state_dict(), self._metadata(self.config))
        text = json.dumps({MODEL_TYPE: self.model_type, **self.config.to_dict()}, indent=2) + "\n"
        write_text(directory / CONFIG_FILE, text)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads what `save_pretrained` wrote, checking every byte of it.

        Returns:
            The model in evaluation mode, deployed where it was deployed when it was saved, on the CPU, with the dtypes
            of the file.

        Raises:
            FileNotFoundError: a file is missing.
            QuantizationError: a file is damaged, or the two do not belong together or to this class; the message
                names the file and both values.
        """
        directory = Path(directory)
        config = cls._read_config(directory)
        path = directory / MODEL_FILE
        tensors, metadata = read_tensors(path)
        cls._check_metadata(path, metadata, config)
        try:
            cls.check_names(config, tensors.keys())
        except QuantizationError as error:
            raise QuantizationError(f"{path}: {error}") from error
        model = cls._build_on_meta(directory / CONFIG_FILE, config)
        model._load(path, tensors)
        if _has_meta_tensors(model):  # Of tensors that no file holds, such as non-persistent buffers.
            model = cls(config)
            model._load(path, tensors)
        return model.eval()

    @classmethod
    def check_names(cls, config: Any, names: Collection[str]) -> None:
        """A look at the names of a file's tensors before the model is built, for a config that would build without end.

        A subclass whose config says how many layers there are overrides it. What passes is compared tensor by tensor.

        Raises:
            QuantizationError: the config wants more than the file has.
        """

    @classmethod
    def _read_config(cls, directory: Path) -> BitModelConfig:
        model_type, values = read_config(directory)
        path = directory / CONFIG_FILE
        if model_type != cls.model_type:
            raise QuantizationError(f'{path}: model_type is "{model_type}", expected "{cls.model_type}"')
        try:
            return cls.config_class.from_dict(values)
        except (QuantizationError, RecursionError) as error:
            raise QuantizationError(f"{path}: {error}") from error

    @classmethod
    def _build_on_meta(cls, path: Path, config: BitModelConfig) -> Self:
        """The model without memory for its tensors."""
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch: sizes that no tensor can have.
            raise QuantizationError(f"{path}: {cls.__name__} cannot be built: {error}") from error

    @classmethod
    def _metadata(cls, config: BitModelConfig) -> dict[str, str]:
        return {"format": "pt", MODEL_TYPE: cls.model_type, **config.to_metadata()}

    @classmethod
    def _check_metadata(cls, path: Path, metadata: dict[str, str], config: BitModelConfig) -> None:
        """The config that the weights were saved with against ours. Files by other hands may have no metadata."""
        for name, expected in cls._metadata(config).items():
            found = metadata.get(name, expected)
            if found != expected:
                raise QuantizationError(f"{path}: saved with {name}={found}, {CONFIG_FILE} says {name}={expected}")

    def _load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.load_state_dict(tensors, assign=True)
        except (QuantizationError, RuntimeError) as error:  # torch: a missing, unknown or misshapen tensor.
            raise QuantizationError(f"{path}: {error}") from error


def _has_meta_tensors(model: nn.Module) -> bool:
    """Whether a parameter, a buffer or a plain attribute of a module has no memory."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    held = chain(model.parameters(), model.buffers(), attributes)
    return any(isinstance(value, Tensor) and value.is_meta for value in held)
