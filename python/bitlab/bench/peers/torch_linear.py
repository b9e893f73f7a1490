"""torch's `nn.Linear` in float32 and bfloat16."""

from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from bitlab.bench.layer import Call, Layer, Prepared


class TorchLinear:
    """`functional.linear`, which is all that `nn.Linear` does."""

    group = "torch"

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.name = f"torch {str(dtype).removeprefix('torch.')}"
        self.family = "float32" if dtype == torch.float32 else None

    def missing(self) -> str | None:
        """Never."""
        return None

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Never."""
        return None

    def prepare(self, layer: Layer) -> Prepared:
        """Dense weights."""
        weight = layer.weight().to(self._dtype)
        weights = [weight.clone() for _ in range(layer.copies(weight.nbytes))]

        def bind(x: Tensor) -> Call:
            inputs, turn = x.to(self._dtype), cycle(weights)
            return lambda: functional.linear(inputs, next(turn))

        return Prepared(weight.nbytes, bind)
