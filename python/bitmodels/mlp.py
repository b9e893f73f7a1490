"""`BitMLPModel`: a multi-layer perceptron, every layer of it ternary."""

import dataclasses
from collections.abc import Collection
from itertools import pairwise
from numbers import Real
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear
from bitmodels.base import BitModelBase
from bitmodels.config import BitModelConfig, require_int
from bitmodels.registry import register_model


@dataclasses.dataclass(frozen=True)
class BitMLPConfig(BitModelConfig):
    """The sizes of a multi-layer perceptron.

    Args:
        n_layers: Number of linear layers, at least 1.
        in_channels: Size of the input.
        hidden_dim: Size of every hidden layer.
        out_channels: Size of the output.
        dropout: Probability, 0 up to 1, with which training drops a hidden activation.
        bias: Whether the layers have a bias.
        quant_config: The schema of every layer; activations per channel by default.

    Raises:
        QuantizationError: a value out of its range.
    """

    n_layers: int = 3
    in_channels: int = 256
    hidden_dim: int = 128
    out_channels: int = 10
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_layers", "in_channels", "hidden_dim", "out_channels"):
            object.__setattr__(self, name, require_int(name, getattr(self, name), minimum=1))
        dropout: object = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
            raise QuantizationError(f"dropout is {dropout!r}, expected a number of at least 0 and below 1")
        if not isinstance(self.dropout, int):  # JSON knows no numbers of NumPy.
            object.__setattr__(self, "dropout", float(self.dropout))
        if not isinstance(self.bias, bool):
            raise QuantizationError(f"bias is {self.bias!r}, expected true or false")

    @property
    def widths(self) -> list[int]:
        """The sizes from the input to the output: n_layers + 1 of them."""
        return [self.in_channels, *[self.hidden_dim] * (self.n_layers - 1), self.out_channels]


@register_model("bit_mlp")
class BitMLPModel(BitModelBase):
    """Ternary linear layers with ReLU and dropout between them, `layers.0` to `layers.<n_layers - 1>`.

    First and last layer are ternary like all others, and nothing but ReLU lies between layers, so that with int8
    activations the output has the same bits wherever it is computed.
    """

    config_class: ClassVar[type[BitModelConfig]] = BitMLPConfig
    config: BitMLPConfig

    def __init__(self, config: BitMLPConfig, quant_config: BitQuantConfig | None = None) -> None:
        super().__init__(config, quant_config)
        widths = self.config.widths
        self.layers = nn.ModuleList(
            BitLinear(width, next_width, self.config.bias, quant_config=self.config.quant_config)
            for width, next_width in pairwise(widths)
        )

    @classmethod
    def check_names(cls, config: BitMLPConfig, names: Collection[str]) -> None:
        layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
        if config.n_layers > len(layers):
            raise QuantizationError(f"holds {len(layers)} layers, the config has n_layers={config.n_layers}")

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits.

        Args:
            x: (*, in_channels), float32, bfloat16 or float16.

        Returns:
            (*, out_channels), of x's dtype.
        """
        *hidden, last = self.layers
        for layer in hidden:
            x = functional.dropout(functional.relu(layer(x)), self.config.dropout, self.training)
        output: Tensor = last(x)
        return output
