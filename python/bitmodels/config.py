"""What describes a model: a frozen dataclass that turns into JSON and into a file's metadata, and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError

CONFIG_FILE = "config.json"
MODEL_TYPE = "model_type"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitModelConfig:
    """Base of every model's config. Subclasses are frozen dataclasses whose fields JSON can hold.

    Args:
        quant_config: The quantization schema of every ternary layer.
    """

    quant_config: BitQuantConfig = dataclasses.field(default_factory=BitQuantConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.quant_config, BitQuantConfig):
            raise QuantizationError(f"quant_config is {self.quant_config!r}, expected a BitQuantConfig")

    def to_dict(self) -> dict[str, Any]:
        """The fields, `quant_config` as a dict of its own."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict()`. A field with a default may be missing.

        Raises:
            QuantizationError: an unknown field, a missing one, or a value that does not exist.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - fields
        if unknown:
            raise QuantizationError(f"{cls.__name__} has no field {sorted(unknown)}; its fields are {sorted(fields)}")
        arguments = dict(values)
        try:
            if isinstance(quant_config := arguments.get("quant_config"), Mapping):
                arguments["quant_config"] = BitQuantConfig(**quant_config)
            return cls(**arguments)
        except TypeError as error:
            raise QuantizationError(f"{cls.__name__}: {error}") from error

    def to_metadata(self) -> dict[str, str]:
        """Flat and textual, for a safetensors header: `{"hidden_dim": "256", "quant_config.activation_dtype": "int8"}`.

        It lets a reader without JSON configs (a C++ program) run the file by itself, and shows a file that belongs to
        another config.
        """
        flat: dict[str, str] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": _text(entry) for key, entry in value.items()})
            else:
                flat[name] = _text(value)
        return flat


def require_int(name: str, value: object, minimum: int) -> None:
    """A field that counts something.

    Raises:
        QuantizationError: `value` is no integer (bool is none) or below `minimum`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise QuantizationError(f"{name} is {value!r}, expected an integer of at least {minimum}")


def read_config(directory: Path) -> tuple[str, dict[str, Any]]:
    """`model_type` and the fields of a saved model's config.

    Raises:
        FileNotFoundError: there is no config.json.
        QuantizationError: it is no JSON object with a `model_type`.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QuantizationError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get(MODEL_TYPE), str):
        raise QuantizationError(f'{path}: expected a JSON object with a "{MODEL_TYPE}"')
    return values.pop(MODEL_TYPE), values


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
