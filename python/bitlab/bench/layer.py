"""The layer that all contenders compute, and how each of them is called."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]
"""One forward pass; every call may read another copy of the weights."""

# A power of two: exact in float32, bfloat16 and float16, so that every peer holds the very same weights. About the size
# that a weight of 2,560 columns has.
WEIGHT_SCALE = 2.0**-6


@dataclass(frozen=True)
class Layer:
    """A ternary linear without bias.

    Attributes:
        codes: int8 (out_features, in_features) of -1, 0, 1.
        rotated_bytes: All copies of a weight together have at least as many, so that no cache holds them; 0: one copy.
    """

    codes: Tensor
    rotated_bytes: int

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.codes.shape[1]

    def weight(self) -> Tensor:
        """float32 (out_features, in_features)."""
        return self.codes.float() * WEIGHT_SCALE

    def copies(self, weight_bytes: int) -> int:
        """How many copies of a weight of this size the calls go through."""
        return 1 + self.rotated_bytes // weight_bytes


@dataclass(frozen=True)
class Prepared:
    """A contender that holds a layer.

    Attributes:
        weight_bytes: Of one copy, all that a call reads.
        bind: Takes x, float32 (rows, in_features), and returns the call. Whatever happens to x in it is not timed:
            only what a model would also do once, such as keeping x in bfloat16.
    """

    weight_bytes: int
    bind: Callable[[Tensor], Call]


def make_layer(out_features: int, in_features: int, rotated_bytes: int) -> Layer:
    """Random codes, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=generator)
    return Layer(codes, rotated_bytes)


def make_x(rows: int, in_features: int) -> Tensor:
    """Normal float32 (rows, in_features), the same at every call."""
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(2))
