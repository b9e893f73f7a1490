"""What was measured, and what follows from it."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bitlab.bench.contenders import OWN_LAYOUT, Contender
from bitlab.bench.limits import Bound, bound, unit
from bitlab.bench.machine import Machine
from bitlab.bench.options import BenchOptions
from bitlab.bench.peers import TORCH_BFLOAT16, TORCH_FLOAT32, TORCH_INT8
from bitlab.times import Spread, spread
from bitmodels.storage import write_text

RATIOS_TO = (TORCH_FLOAT32, TORCH_BFLOAT16, TORCH_INT8)
SLOWER_ALLOWED_PERCENT = 5.0


@dataclass(frozen=True)
class Case:
    """What the subjects that take turns have in common."""

    out_features: int
    in_features: int
    rows: int
    threads: int

    @property
    def operations(self) -> float:
        """A multiply-add counts as two."""
        return 2.0 * self.rows * self.out_features * self.in_features


@dataclass(frozen=True)
class Limit:
    """A limit as one case's turns found it, for all threads together. limits.unit: GB/s, GOPS or ns."""

    case: Case
    name: str
    value: Spread

    @property
    def reached(self) -> float:
        """Of a read the median, as of those who read: what others leave of the memory changes for all of them alike.

        Of multiply-adds the upper decile: measured too low they would flatter everybody, and noise only lowers them.
        """
        return self.value.high if unit(self.name) == "GOPS" else self.value.median


@dataclass(frozen=True)
class Measurement:
    """One contender in one case.

    Attributes:
        time: Microseconds of a call.
        gb_per_s: Of weights alone, 10^9 bytes.
        gops: 10^9 operations per second.
        bound: The shortest time that the limits of this case allow; None where the peak is not measured.
        ratios: How many times as long each of torch's layers takes, by name.
    """

    case: Case
    contender: Contender
    weight_bytes: int
    time: Spread
    bound: Bound | None
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """Weights read."""
        return self.weight_bytes / self.time.median / 1e3

    @property
    def gops(self) -> float:
        """Operations done."""
        return self.case.operations / self.time.median / 1e3

    @property
    def percent_of_limit(self) -> float | None:
        """The shortest possible time divided by the median."""
        return None if self.bound is None else 100 * self.bound.microseconds / self.time.median


@dataclass(frozen=True)
class TrainingMeasurement:
    """One layer's forward and backward.

    Attributes:
        precision: "float32" or "bfloat16 autocast".
        time: Microseconds of both together.
        kept_bytes: What forward keeps for backward beside the parameters.
    """

    case: Case
    name: str
    precision: str
    time: Spread
    kept_bytes: int


@dataclass(frozen=True)
class OverheadMeasurement:
    """One way to call a tiny layer.

    Attributes:
        mode: "no_grad" or "forward + backward".
        time: Microseconds of a call.
        above_linear_us: Its median minus that of `nn.Linear` in the same mode.
    """

    mode: str
    name: str
    time: Spread
    above_linear_us: float


@dataclass(frozen=True)
class DispatchCheck:
    """The dispatched kernel next to the fastest one that was forced, in one case, layout and activation dtype.

    Attributes:
        percent_slower: Of the medians.
        ranges_overlap: Whether the middle 80 % of their times have something in common: then the difference may be
            the machine's noise.
    """

    case: Case
    activations: str
    layout: str
    dispatched: str
    best: str
    percent_slower: float
    ranges_overlap: bool

    @property
    def within_allowance(self) -> bool:
        """Whether it is slower by no more than is allowed."""
        return self.percent_slower <= SLOWER_ALLOWED_PERCENT


@dataclass
class Results:
    """Of a whole run."""

    machine: Machine
    command: str
    date: str
    options: BenchOptions
    weights_from: str
    limits: list[Limit] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    training: list[TrainingMeasurement] = field(default_factory=list)
    overhead: list[OverheadMeasurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def measurement(
    case: Case, contender: Contender, weight_bytes: int, samples: list[float], limits: dict[str, Limit], read: str
) -> Measurement:
    """Of a contender's samples in microseconds. limits: of the same case, by name; read: the name of the bandwidth."""
    least = None
    if contender.path is not None:
        least = bound(weight_bytes, case.operations, limits[read].reached, limits[contender.path].reached)
    return Measurement(case, contender, weight_bytes, spread(samples), least)


def with_ratios(measurements: list[Measurement]) -> list[Measurement]:
    """The measurements of one case, each with its ratios."""
    times = {m.contender.name: m.time.median for m in measurements if m.contender.name in RATIOS_TO}
    return [replace(m, ratios={name: time / m.time.median for name, time in times.items()}) for m in measurements]


def dispatch_checks(measurements: Iterable[Measurement]) -> list[DispatchCheck]:
    """Wherever the dispatched kernel and another one were measured on the same weights.

    A kernel with a form of its own takes part in every layout.
    """
    groups: dict[tuple[Case, str, str], list[Measurement]] = {}
    kernels = [m for m in measurements if not m.contender.is_peer]
    forms = {(m.contender.form, m.contender.weights) for m in kernels if m.contender.layout != OWN_LAYOUT}
    for m in kernels:
        own = m.contender.layout == OWN_LAYOUT
        fitting = sorted(form for form, weights in forms if weights == m.contender.weights)
        for layout in fitting if own else [m.contender.form]:
            groups.setdefault((m.case, m.contender.activations, layout), []).append(m)
    return [check for key, members in groups.items() if (check := _dispatch_check(key, members)) is not None]


def _dispatch_check(key: tuple[Case, str, str], members: list[Measurement]) -> DispatchCheck | None:
    chosen = next((m for m in members if m.contender.dispatched), None)
    if chosen is None or len(members) < 2:
        return None
    best = min(members, key=lambda m: m.time.median)
    slower = 100 * (chosen.time.median / best.time.median - 1)
    overlap = best.time.high >= chosen.time.low
    return DispatchCheck(*key, chosen.contender.name, best.contender.name, slower, overlap)


def training_ratios(found: Iterable[TrainingMeasurement], of: str) -> dict[tuple[Case, str, str], tuple[float, float]]:
    """How many times the time and the kept bytes of the layer called `of` each other layer has.

    By case, precision and name. Bytes: NaN where `of` keeps none.
    """
    found = list(found)
    base = {(m.case, m.precision): m for m in found if m.name == of}
    ratios = {}
    for m in found:
        ours = base.get((m.case, m.precision))
        if ours is not None and m.name != of:
            bytes_ratio = m.kept_bytes / ours.kept_bytes if ours.kept_bytes else math.nan
            ratios[m.case, m.precision, m.name] = m.time.median / ours.time.median, bytes_ratio
    return ratios


def overall_limits(limits: Iterable[Limit]) -> dict[tuple[str, int], Spread]:
    """By name and threads: over the cases, what each of them reached."""
    groups: dict[tuple[str, int], list[float]] = {}
    for limit in limits:
        groups.setdefault((limit.name, limit.case.threads), []).append(limit.reached)
    return {key: spread(values) for key, values in groups.items()}


def write(results: Results, path: Path) -> None:
    """Writes the JSON; docs/api.md describes it."""
    write_text(path, json.dumps(_to_json(results), indent=1) + "\n")


def _to_json(results: Results) -> dict[str, Any]:
    return {
        "machine": asdict(results.machine),
        "command": results.command,
        "date": results.date,
        "seconds": round(results.seconds, 1),
        "settings": asdict(results.options) | {"output": str(results.options.output)},
        "weights_from": results.weights_from,
        "limits": [_limit(limit) for limit in results.limits],
        "measurements": [_measurement(m) for m in results.measurements],
        "dispatch": [_dispatch(check) for check in dispatch_checks(results.measurements)],
        "training": [_training(m) for m in results.training],
        "overhead": [_overhead(m) for m in results.overhead],
        "skipped": [{"name": name, "reason": reason} for name, reason in results.skipped.items()],
    }


def _limit(limit: Limit) -> dict[str, Any]:
    return asdict(limit.case) | {"name": limit.name, "unit": unit(limit.name)} | _spread(limit.value, "")


def _measurement(m: Measurement) -> dict[str, Any]:
    return {
        **asdict(m.case),
        **asdict(m.contender),
        "weight_bytes": m.weight_bytes,
        **_spread(m.time, "_us"),
        "gb_per_s": m.gb_per_s,
        "gops": m.gops,
        "limit_us": m.bound.microseconds if m.bound else None,
        "limited_by": m.bound.by if m.bound else None,
        "percent_of_limit": m.percent_of_limit,
        "times_as_fast_as": m.ratios,
    }


def _dispatch(check: DispatchCheck) -> dict[str, Any]:
    flat = asdict(check)
    return flat.pop("case") | flat | {"within_allowance": check.within_allowance}


def _training(m: TrainingMeasurement) -> dict[str, Any]:
    return {
        **asdict(m.case),
        "name": m.name,
        "precision": m.precision,
        **_spread(m.time, "_us"),
        "kept_bytes": m.kept_bytes,
    }


def _overhead(m: OverheadMeasurement) -> dict[str, Any]:
    return {"mode": m.mode, "name": m.name, **_spread(m.time, "_us"), "above_linear_us": m.above_linear_us}


def _spread(value: Spread, suffix: str) -> dict[str, Any]:
    return {
        f"median{suffix}": value.median,
        f"p10{suffix}": value.low,
        f"p90{suffix}": value.high,
        "repetitions": value.count,
    }
