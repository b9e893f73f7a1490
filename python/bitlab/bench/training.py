"""Training: forward and backward of the layer, and the bytes that it keeps between them, next to other layers'."""

import importlib
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitlab.bench.contenders import config_of
from bitlab.bench.layer import Call, make_x
from bitlab.bench.options import BenchOptions
from bitlab.bench.peers.transformers_bitnet import MODULE
from bitlab.bench.results import Case, TrainingMeasurement
from bitlab.bench.timing import CallSampler, take_turns
from bitlab.times import spread
from bitlayers import BitLinear

PRECISIONS = {"float32": None, "bfloat16 autocast": torch.bfloat16}
BITLINEAR, PLAIN_STE, AUTO_BITLINEAR = "BitLinear", "plain straight-through", "transformers AutoBitLinear"


class PlainSte(nn.Linear):
    """The straight-through estimator as one writes it in torch: fake quantization, its rounding detached."""

    def forward(self, input: Tensor) -> Tensor:
        """y of quantized weight and activations."""
        weight_scale = self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight / weight_scale).round().clamp(-1, 1) * weight_scale
        x_scale = input.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        x = (input / x_scale).round().clamp(-128, 127) * x_scale
        quantized = input + (x - input).detach()
        return functional.linear(quantized, self.weight + (weight - self.weight).detach(), self.bias)


def _bitlinear(out_features: int, in_features: int) -> nn.Module:
    return BitLinear(in_features, out_features, bias=False, quant_config=config_of("int8"))


def _auto_bitlinear(out_features: int, in_features: int) -> nn.Module:
    layer: nn.Module = importlib.import_module(MODULE).AutoBitLinear(
        in_features, out_features, bias=False, online_quant=True
    )
    return layer


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    BITLINEAR: _bitlinear,
    "nn.Linear": lambda out_features, in_features: nn.Linear(in_features, out_features, bias=False),
    PLAIN_STE: lambda out_features, in_features: PlainSte(in_features, out_features, bias=False),
    AUTO_BITLINEAR: _auto_bitlinear,
}
"""How each layer is made, without bias, from out_features and in_features."""


def available_layers() -> tuple[dict[str, Callable[[int, int], nn.Module]], dict[str, str]]:
    """The layers that can be made here, and why the others cannot, by name."""
    reason = None
    if importlib.util.find_spec("transformers") is None:
        reason = "the package transformers is not installed"
    else:
        try:
            importlib.import_module(MODULE).AutoBitLinear  # noqa: B018
        except (ImportError, AttributeError) as error:
            reason = f"{MODULE}.AutoBitLinear cannot be imported: {error}"
    if reason is None:
        return LAYERS, {}
    return {name: make for name, make in LAYERS.items() if name != AUTO_BITLINEAR}, {AUTO_BITLINEAR: reason}


@dataclass(frozen=True)
class Step:
    """One forward and backward of a layer.

    Attributes:
        layer: Trainable.
        x: (rows, in_features); its gradient is computed too, as within a model.
        autocast: The dtype; None: no autocast.
    """

    layer: nn.Module
    x: Tensor
    autocast: torch.dtype | None

    def forward(self) -> Tensor:
        """y."""
        if self.autocast is None:
            return self.layer(self.x)
        with torch.autocast("cpu", dtype=self.autocast):
            return self.layer(self.x)

    def call(self) -> Call:
        """Forward and backward, as the clock sees it: gradients are computed and dropped."""
        leaves = [self.x, *self.layer.parameters()]
        dy = torch.randn(self.forward().shape, generator=torch.Generator().manual_seed(3)).to(self.forward().dtype)
        return lambda: torch.autograd.grad(self.forward(), leaves, dy)[0]

    def kept_bytes(self) -> int:
        """Bytes that forward keeps for backward: of all tensors that autograd has saved when it returns, but the
        parameters themselves.

        Each storage counts once, whatever part of it is saved and however often; x counts where it is saved.
        """
        kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def keep(tensor: Tensor) -> _Kept:
            saved = _Kept(tensor.detach())  # With its graph, an operation's own output would keep itself.
            kept.add(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
            y = self.forward()
        storages = {
            storage.data_ptr(): storage.nbytes() for saved in kept for storage in [saved.tensor.untyped_storage()]
        }
        del y
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.layer.parameters()}
        return sum(size for address, size in storages.items() if address not in parameters)


@dataclass(eq=False)
class _Kept:
    """A saved tensor; it is gone where the graph that saved it is, as that of a detached part."""

    tensor: Tensor


def measure(options: BenchOptions, advance: Callable[[], Any]) -> list[TrainingMeasurement]:
    """Every shape, number of rows and number of threads, in every precision.

    Args:
        options: What to measure.
        advance: Called after each case.
    """
    layers, _ = available_layers()
    found = []
    cases = list(product(options.shapes, options.threads, options.rows))
    for (out_features, in_features), threads, rows in cases:
        torch.set_num_threads(threads)
        case = Case(out_features, in_features, rows, threads)
        made = {name: make(out_features, in_features).train() for name, make in layers.items()}
        x = make_x(rows, in_features).requires_grad_()
        for precision, autocast in PRECISIONS.items():
            steps = {name: Step(layer, x, autocast) for name, layer in made.items()}
            samplers = {name: CallSampler(step.call()) for name, step in steps.items()}
            samples = take_turns(samplers, options.repetitions, options.seconds / len(cases) / len(PRECISIONS))
            found += [
                TrainingMeasurement(case, name, precision, spread(samples[name]), step.kept_bytes())
                for name, step in steps.items()
            ]
            advance()
    return found
