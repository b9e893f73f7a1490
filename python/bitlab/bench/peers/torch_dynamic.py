"""torch's dynamic int8 linear, as `quantize_dynamic` makes it of `nn.Linear`; its engines are FBGEMM and oneDNN."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor

from bitlab.bench.layer import WEIGHT_SCALE, Call, Layer, Prepared


class TorchDynamicInt8:
    """`quantized::linear_dynamic`: quantizes x to 8 bits by its range, and multiplies by int8 weights.

    The engine packs the weights, and what it packed it also multiplies.
    """

    family = "int8"

    def __init__(self, name: str, group: str, engine: str | None) -> None:
        """engine: of torch.backends.quantized.supported_engines; None: the one that torch chooses here."""
        self.name = name
        self.group = group
        self._engine = engine

    def missing(self) -> str | None:
        """Where torch was built without the engine."""
        engines = torch.backends.quantized.supported_engines
        if self._engine is not None and self._engine not in engines:
            return f"torch {torch.__version__} has no quantized engine {self._engine}, only {', '.join(engines)}"
        if self._engine is None and torch.backends.quantized.engine == "none":
            return f"torch {torch.__version__} has no quantized engine"
        return None

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Never."""
        return None

    def prepare(self, layer: Layer) -> Prepared:
        """One byte a weight."""
        with _engine(self._engine), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # Deprecated, and the only way.
            weight = torch._make_per_tensor_quantized_tensor(layer.codes, WEIGHT_SCALE, 0)
            packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(layer.copies(weight.numel()))]

        def bind(x: Tensor) -> Call:
            turn = cycle(packed)
            # reduce_range as torch's own layer has it: 7 bits of x, which pairs of products need without VNNI.
            return lambda: torch.ops.quantized.linear_dynamic(x, next(turn), reduce_range=True)

        return Prepared(weight.numel(), bind)


@contextmanager
def _engine(name: str | None) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = before if name is None else name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
