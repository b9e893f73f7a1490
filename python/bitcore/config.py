"""What is quantized, and how finely."""

from dataclasses import dataclass
from typing import Literal

from bitcore.exceptions import QuantizationError

Granularity = Literal["per_tensor", "per_channel"]
ActivationDtype = Literal["float32", "int8"]

_CHOICES = {
    "weight_granularity": ("per_tensor", "per_channel"),
    "activation_dtype": ("float32", "int8"),
    "activation_granularity": ("per_tensor", "per_channel"),
}


@dataclass(frozen=True)
class BitQuantConfig:
    """The quantization schema of one linear layer. Weights are always ternary (-1, 0, +1). Immutable and hashable.

    Args:
        weight_granularity: `"per_tensor"`: one scale for the whole weight; `"per_channel"`: one per output row.
        activation_dtype: `"int8"`: activations are quantized to -128..127; `"float32"`: they are not quantized.
        activation_granularity: `"per_channel"`, the rule of BitNet b1.58: one scale per row of x (per token or sample);
            `"per_tensor"`: one scale for all of x, which ties a row's result to the rest of its batch.

    Raises:
        QuantizationError: an argument has a value that does not exist.
        TypeError: an unknown keyword.
    """

    weight_granularity: Granularity = "per_tensor"
    activation_dtype: ActivationDtype = "int8"
    activation_granularity: Granularity = "per_channel"

    def __post_init__(self) -> None:
        for argument, choices in _CHOICES.items():
            value = getattr(self, argument)
            if not (isinstance(value, str) and value in choices):
                allowed = " or ".join(f'"{choice}"' for choice in choices)
                raise QuantizationError(f"{argument} is {value!r}, expected {allowed}")

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """The config as the operators take it: weight per channel, int8 activations, activations per channel."""
        return (
            self.weight_granularity == "per_channel",
            self.activation_dtype == "int8",
            self.activation_granularity == "per_channel",
        )


def all_configs() -> tuple[BitQuantConfig, ...]:
    """Every config that exists: eight."""
    return tuple(
        BitQuantConfig(weight, dtype, activation)
        for weight in ("per_tensor", "per_channel")
        for dtype in ("float32", "int8")
        for activation in ("per_tensor", "per_channel")
    )


def require_config(quant_config: object) -> BitQuantConfig:
    """Returns `quant_config`.

    Raises:
        QuantizationError: it is None or no BitQuantConfig.
    """
    if not isinstance(quant_config, BitQuantConfig):
        raise QuantizationError(f"quant_config is {quant_config!r}, expected a BitQuantConfig")
    return quant_config
