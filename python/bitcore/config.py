"""What is quantized, and how finely."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bitcore.exceptions import QuantizationError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
ActivationDtype = Literal["float32", "int8"]

GROUP_SIZES = (32, 64, 128, 256)
DEFAULT_GROUP_SIZE = 128
"""What group_size is where no scale is per group."""

_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
_CHOICES = {
    "weight_granularity": _GRANULARITIES,
    "activation_dtype": ("float32", "int8"),
    "activation_granularity": _GRANULARITIES,
}


@dataclass(frozen=True)
class BitQuantConfig:
    """The quantization schema of one linear layer. Weights are always ternary (-1, 0, +1). Immutable and hashable.

    Args:
        weight_granularity: `"per_tensor"`: one scale for the whole weight; `"per_channel"`: one per output row;
            `"per_group"`: one float16 scale for each group of `group_size` adjacent weights of a row.
        activation_dtype: `"int8"`: activations are quantized to -128..127; `"float32"`: they are not quantized.
        activation_granularity: `"per_channel"`, the rule of BitNet b1.58: one scale per row of x (per token or sample);
            `"per_tensor"`: one scale for all of x, which ties a row's result to the rest of its batch; `"per_group"`:
            one for each group of a row, only for int8 activations and weights that are per_group.
        group_size: 32, 64, 128 or 256 where weights are per_group; otherwise 128. The last group of a row may be
            shorter: in_features need not be a multiple.

    Raises:
        QuantizationError: an argument has a value that does not exist, or two do not fit together.
        TypeError: an unknown keyword.
    """

    weight_granularity: Granularity = "per_tensor"
    activation_dtype: ActivationDtype = "int8"
    activation_granularity: Granularity = "per_channel"
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        for argument, choices in _CHOICES.items():
            value = getattr(self, argument)
            if not (isinstance(value, str) and value in choices):
                raise QuantizationError(f"{argument} is {value!r}, expected {_any_of(choices)}")
        self._check_groups()

    def _check_groups(self) -> None:
        size, weights = self.group_size, self.weight_granularity
        if isinstance(size, bool) or not isinstance(size, int) or size not in GROUP_SIZES:
            raise QuantizationError(f"group_size is {size!r}, expected 32, 64, 128 or 256")
        if weights != "per_group" and size != DEFAULT_GROUP_SIZE:
            raise QuantizationError(
                f'group_size is {size} and weight_granularity is "{weights}", expected {DEFAULT_GROUP_SIZE}, '
                'or "per_group"'
            )
        if self.activation_granularity != "per_group":
            return
        if weights != "per_group":
            raise QuantizationError(
                f'activation_granularity is "per_group" and weight_granularity is "{weights}", '
                'expected "per_group" for both'
            )
        if self.activation_dtype != "int8":
            raise QuantizationError(
                f'activation_granularity is "per_group" and activation_dtype is "{self.activation_dtype}", '
                'expected "int8"'
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as JSON holds them; group_size only where weights are per group."""
        values = asdict(self)
        if self.weight_granularity != "per_group":
            del values["group_size"]
        return values

    def with_fields(self, fields: Mapping[str, Any]) -> "BitQuantConfig":
        """The config with some fields replaced. Another weight_granularity comes with its own group_size, or 128.

        Raises:
            QuantizationError, TypeError: as the constructor.
        """
        values = {**self.to_dict(), **fields}
        if "weight_granularity" in fields and "group_size" not in fields:
            values.pop("group_size", None)
        return BitQuantConfig(**values)

    def fields_unlike(self, other: "BitQuantConfig") -> dict[str, Any]:
        """What `other.with_fields()` has to be given to return this config."""
        theirs = other.to_dict()
        return {name: value for name, value in self.to_dict().items() if value != theirs.get(name)}

    def weight_scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Of a weight's scales: () per tensor, (out_features,) per channel, (out_features, groups) per group."""
        if self.weight_granularity == "per_group":
            return out_features, -(-in_features // self.group_size)
        return (out_features,) if self.weight_granularity == "per_channel" else ()

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """The config as the operators take it: weight per channel, int8 activations, activations per channel."""
        return (
            self.weight_granularity == "per_channel",
            self.activation_dtype == "int8",
            self.activation_granularity == "per_channel",
        )

    @property
    def group_arguments(self) -> tuple[()] | tuple[int, bool]:
        """The operators' last arguments, which have defaults: group_size, activations per group; () without groups."""
        if self.weight_granularity != "per_group":
            return ()
        return self.group_size, self.activation_granularity == "per_group"

    def operator_arguments(self, out_dtype: object = None, kernel_name: str | None = None) -> tuple[object, ...]:
        """What the layer's operators take after the tensors. What has a default at the end may be left out."""
        last = (kernel_name, *self.group_arguments)
        return (*self.flags, out_dtype) if last == (None,) else (*self.flags, out_dtype, *last)

    @property
    def weight_group_size(self) -> int:
        """group_size where weights are per group, otherwise 0."""
        return self.group_size if self.weight_granularity == "per_group" else 0

    @property
    def x_group_size(self) -> int:
        """group_size where activations are per group, otherwise 0."""
        return self.group_size if self.activation_granularity == "per_group" else 0


def _any_of(choices: tuple[str, ...]) -> str:
    *first, last = (f'"{choice}"' for choice in choices)
    return ", ".join(first) + f" or {last}"


def all_configs() -> tuple[BitQuantConfig, ...]:
    """Every config that exists: eight without groups first, then five for each group size."""
    without = tuple(
        BitQuantConfig(weight, dtype, activation)
        for weight in ("per_tensor", "per_channel")
        for dtype in ("float32", "int8")
        for activation in ("per_tensor", "per_channel")
    )
    activations: tuple[tuple[ActivationDtype, Granularity], ...] = (
        ("float32", "per_tensor"),
        ("float32", "per_channel"),
        ("int8", "per_tensor"),
        ("int8", "per_channel"),
        ("int8", "per_group"),
    )
    return without + tuple(
        BitQuantConfig("per_group", dtype, activation, size)
        for size in GROUP_SIZES
        for dtype, activation in activations
    )


def require_config(quant_config: object) -> BitQuantConfig:
    """Returns `quant_config`.

    Raises:
        QuantizationError: it is None or no BitQuantConfig.
    """
    if not isinstance(quant_config, BitQuantConfig):
        raise QuantizationError(f"quant_config is {quant_config!r}, expected a BitQuantConfig")
    return quant_config
