"""What describes a model: a frozen dataclass that turns into JSON and into a file's metadata, and back."""

import dataclasses
import json
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Self, get_type_hints

from bitcore.config import BitQuantConfig
from bitcore.exceptions import FileError, QuantizationError
from bitmodels.json_pairs import unique_pairs
from bitmodels.registry import current_name

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
        return dataclasses.asdict(self) | {"quant_config": self.quant_config.to_dict()}

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
                arguments["quant_config"] = BitQuantConfig(**numbers_of_fields(BitQuantConfig, dict(quant_config)))
            return cls(**numbers_of_fields(cls, arguments))
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


def require_int(name: str, value: object, minimum: int) -> int:
    """The value of a field that counts something, as an int (NumPy has others).

    Raises:
        QuantizationError: `value` is no integer (bool is none) or below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise QuantizationError(f"{name} is {value!r}, expected an integer of at least {minimum}")
    return int(value)


def read_config(directory: Path) -> tuple[str, dict[str, Any]]:
    """`model_type` and the fields of a saved model's config.

    Raises:
        FileNotFoundError: there is no config.json.
        FileError: it is no JSON object with a `model_type`, or names something twice.
    """
    path = directory / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")  # Some editors put a byte order mark first.
        values = json.loads(text, object_pairs_hook=unique_pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get(MODEL_TYPE), str):
        raise FileError(f'{path}: expected a JSON object with a "{MODEL_TYPE}"')
    return current_name(values.pop(MODEL_TYPE)), values


def same_value(left: str, right: str) -> bool:
    """Whether two texts of metadata mean the same: 0 is 0.0 and 1e-1 is 0.1."""
    if left == right:
        return True
    try:
        numbers = [json.loads(text) for text in (left, right)]
    except (ValueError, RecursionError):
        return False
    return all(type(number) in (int, float) for number in numbers) and numbers[0] == numbers[1]


def numbers_of_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """JSON has one kind of number, and writers differ: 3.0 is an integer there, and 0 a fraction."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # A class with annotations that only type checkers can read.
        return values
    numbers: dict[str, Any] = {}
    for name, value in values.items():
        if hints.get(name) is int and isinstance(value, float) and value.is_integer():
            numbers[name] = int(value)
        elif hints.get(name) is float and type(value) is int and abs(value) < 2**53:
            numbers[name] = float(value)
    return {**values, **numbers}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
