"""What a call costs where the layer is so small that arithmetic costs nothing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitlab.bench.contenders import config_of
from bitlab.bench.layer import Call
from bitlab.bench.options import BenchOptions
from bitlab.bench.results import OverheadMeasurement
from bitlab.bench.timing import BatchSampler, take_turns
from bitlab.times import spread
from bitlayers import BitLinear

SIZE = 8  # Rows, out_features and in_features.
INFERENCE, GRADIENTS = "no_grad", "forward + backward"
REFERENCE = "nn.Linear"


def _inference(layer: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def _step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    leaf, dy = x.clone().requires_grad_(), torch.ones(SIZE, SIZE)

    def call() -> Tensor:
        y = layer(leaf)
        y.backward(dy)
        return y

    return call


def calls() -> dict[tuple[str, str], Call]:
    """What is timed, by mode and name: the layer in every state, and the operator below it, next to `nn.Linear`."""
    config = config_of("int8")
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    linear = nn.Linear(SIZE, SIZE)
    states = {
        REFERENCE: linear,
        "BitLinear, training": BitLinear(SIZE, SIZE, quant_config=config),
        "BitLinear, evaluation": BitLinear(SIZE, SIZE, quant_config=config).eval(),
        "BitLinear, deployed": BitLinear(SIZE, SIZE, quant_config=config).deploy(),
    }
    deployed = states["BitLinear, deployed"]
    weights = (deployed.qweight_scale, deployed.qweight, deployed.bias, *config.operator_arguments())

    def operator(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.bitcore.bitlinear.default(x, *weights)
        return y

    timed: dict[tuple[str, str], Call] = {
        (INFERENCE, name): _inference(layer, x) for name, layer in states.items() if name != "BitLinear, training"
    }
    timed[INFERENCE, "torch.ops.bitcore.bitlinear"] = _inference(operator, x)
    return timed | {(GRADIENTS, name): _step(layer, x) for name, layer in states.items()}


def measure(options: BenchOptions) -> list[OverheadMeasurement]:
    """All of them in turns, on one thread: a layer of this size never uses more."""
    torch.set_num_threads(1)
    timed = calls()
    samples = take_turns({key: BatchSampler(call) for key, call in timed.items()}, options.repetitions, options.seconds)
    times = {key: spread(values) for key, values in samples.items()}
    return [
        OverheadMeasurement(mode, name, time, time.median - times[mode, REFERENCE].median)
        for (mode, name), time in times.items()
    ]
