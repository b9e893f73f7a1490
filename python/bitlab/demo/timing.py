"""How long a layer takes against `nn.Linear`: in turns, medians with their spread."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitlab.times import format_spread, spread
from bitlayers import BitLinear

SHAPES = ((2560, 2560), (6912, 2560))  # out_features x in_features: layers of a language model of 2 billion weights.
ROWS = (1, 512)
ROTATED_BYTES = 256 * 2**20  # Beyond any last-level cache that one core sees.
# The contenders take turns, with a block of calls at each turn: as in a model, code is warm, whatever the weights are.
BLOCKS = 10
CALLS_PER_BLOCK = {1: 12, 512: 2}

FLOAT32 = "nn.Linear float32"
BFLOAT16 = "nn.Linear bfloat16"
TERNARY = "BitLinear"
CONTENDERS = (FLOAT32, BFLOAT16, TERNARY)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, and the range that holds the middle 80 percent."""

    layer: str
    out_features: int
    in_features: int
    rows: int
    median_us: float
    low_us: float
    high_us: float
    calls: int
    weights: str


def measure(on_case: Callable[[], None]) -> list[Timing]:
    """Times every shape and number of rows, with as many threads as torch uses."""
    timings = []
    for out_features, in_features in SHAPES:
        layers = _layers(out_features, in_features)
        for rows in ROWS:
            timings += _measure_case(layers, rows)
            on_case()
    return timings


def _layers(out_features: int, in_features: int) -> dict[str, nn.Module]:
    """The same weights three times. The float layers have no gradients to keep."""
    config = BitQuantConfig(activation_granularity="per_channel")
    linear = nn.Linear(in_features, out_features).requires_grad_(False).eval()
    ternary = BitLinear.from_linear(deepcopy(linear), config).deploy()
    return {FLOAT32: linear, BFLOAT16: deepcopy(linear).to(torch.bfloat16), TERNARY: ternary}


@torch.inference_mode()
def _measure_case(layers: dict[str, nn.Module], rows: int) -> list[Timing]:
    """One row: every call reads another copy of the weights, from memory. Many rows: one copy, partly in cache."""
    copies = {name: cycle(_copies(layer) if rows == 1 else [layer]) for name, layer in layers.items()}
    in_features = next(iter(layers.values())).in_features
    x = torch.randn(rows, int(in_features))  # type: ignore[arg-type]
    inputs = {name: x.bfloat16() if name == BFLOAT16 else x for name in layers}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(BLOCKS):
        for name in layers:
            _time_call(copies[name], inputs[name])
            times[name] += [_time_call(copies[name], inputs[name]) for _ in range(CALLS_PER_BLOCK[rows])]
    return [_summary(name, layer, rows, times[name]) for name, layer in layers.items()]


def _time_call(copies: Iterator[nn.Module], x: Tensor) -> float:
    layer = next(copies)
    start = time.perf_counter_ns()
    layer(x)
    return (time.perf_counter_ns() - start) / 1000


def _copies(layer: nn.Module) -> list[nn.Module]:
    return [layer, *(deepcopy(layer) for _ in range(ROTATED_BYTES // weight_bytes(layer)))]


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of everything that a layer holds."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def _summary(name: str, layer: nn.Module, rows: int, times: list[float]) -> Timing:
    found = spread(times)
    weights = "from memory" if rows == 1 else "reused"
    out_features, in_features = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    return Timing(name, out_features, in_features, rows, found.median, found.low, found.high, found.count, weights)


def find(timings: list[Timing], shape: tuple[int, int], rows: int) -> dict[str, Timing]:
    """The contenders of one case, by name."""
    return {t.layer: t for t in timings if (t.out_features, t.in_features) == shape and t.rows == rows}


def print_timings(timings: list[Timing], console: Console) -> None:
    """Shows the medians as a table."""
    title = (
        f"One layer, {torch.get_num_threads()} threads: median time of a call (10th to 90th percentile)\n"
        "1 row: every call reads another copy of the weights, from memory; 512 rows: one copy, partly in cache"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("out x in", "rows"):
        table.add_column(column)
    for name in CONTENDERS:
        table.add_column(name, justify="right")
    table.add_column("gain over\nfloat32", justify="right")
    for shape in SHAPES:
        for rows in ROWS:
            case = find(timings, shape, rows)
            cells = [format_spread(t.median_us, t.low_us, t.high_us) for t in (case[name] for name in CONTENDERS)]
            gain = case[FLOAT32].median_us / case[TERNARY].median_us
            table.add_row(f"{shape[0]} x {shape[1]}", str(rows), *cells, f"[bold]{gain:.1f} x[/bold]")
    console.print(table)
