"""What this machine can do at most, measured in turns with everything else, and which part of it bounds whom."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitcore.config import ActivationDtype, BitQuantConfig
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitlab.bench.limits_library import (
    STREAMS,
    measure_multiply_adds,
    measure_read,
    measure_round_trip,
    multiply_adds,
)

READ = "memory read"
READ_IN_CACHE = "cache read"
ROUND_TRIP = "cache line round trip"  # Bounds nobody, but tells which cache the cores share.
STEP_BYTES = 256  # That a stream reads at once: smaller weights are repeated until there is one for every stream.
READ_BYTES = 64 * 2**20  # Of one measurement: milliseconds, beside which the start of a thread is little.
SMALL_BYTES = 2**18  # A smaller weight is read as often as makes more: otherwise the start of a thread is most of it.
TURN_BYTES = 16 * 2**20  # Of weights that are read one after another in a turn.
PEAK_SECONDS, PEAK_SAMPLES = 1e-3, 5
ROUND_TRIP_REPEATS = 5


def weight_read(layout: str, in_cache: bool) -> str:
    """The name of the limit that is a read of the packed weights of a layout."""
    return f"{READ_IN_CACHE if in_cache else READ} {layout}"


def is_read(name: str) -> bool:
    """Whether a limit is in GB/s."""
    return name.startswith((READ, READ_IN_CACHE))


def unit(name: str) -> str:
    """Of a limit."""
    if name == ROUND_TRIP:
        return "ns"
    return "GB/s" if is_read(name) else "GOPS"


@dataclass(frozen=True)
class Bound:
    """The shortest time that the limits allow, and which of them sets it: "memory" or "arithmetic"."""

    microseconds: float
    by: str


def bound(weight_bytes: int, operations: float, gb_per_s: float, gops: float) -> Bound:
    """The larger of bytes / bandwidth and operations / peak.

    Args:
        weight_bytes: All bytes of one weight.
        operations: 2 * rows * out_features * in_features.
        gb_per_s: 10^9 bytes per second.
        gops: 10^9 operations per second.
    """
    memory, arithmetic = weight_bytes / gb_per_s / 1e3, operations / gops / 1e3
    return Bound(memory, "memory") if memory >= arithmetic else Bound(arithmetic, "arithmetic")


def supported_paths() -> list[str]:
    """The multiply-adds that this CPU has."""
    return [loop.name for loop in multiply_adds().values() if loop.supported]


def best_path(family: ActivationDtype) -> str:
    """The fastest multiply-adds of "int8" or "float32" that this CPU has: those of the best kernel that names some."""
    supported, config = supported_paths(), BitQuantConfig(activation_dtype=family)
    return next(k.path for k in KernelRegistry.all_kernels() if k.path in supported and k.is_compatible_with(config))


def kernel_path(kernel: BitKernelBase, config: BitQuantConfig) -> str:
    """The multiply-adds that a kernel is made of; if it does not say: the fastest of its activations."""
    return kernel.path or best_path(config.activation_dtype)


def peak_sampler(path: str) -> Callable[[], list[float]]:
    """Measures the peak of all of torch's threads together, in GOPS."""
    probe = 1000
    measure_multiply_adds(path, probe)
    operations = multiply_adds()[path].operations
    per_second = measure_multiply_adds(path, probe)
    rounds = max(probe, int(per_second / torch.get_num_threads() / operations * PEAK_SECONDS))
    return lambda: [measure_multiply_adds(path, rounds) / 1e9 for _ in range(PEAK_SAMPLES)]


def round_trip_sampler() -> Callable[[], list[float]] | None:
    """Measures how long a cache line takes from torch's first thread to the slowest of the others and back, in ns.

    None with one thread, and where not all of them run at a time.
    """
    if torch.get_num_threads() < 2 or not _round_trip():
        return None
    return _round_trip


def _round_trip() -> list[float]:
    seconds = measure_round_trip(ROUND_TRIP_REPEATS)
    return [seconds * 1e9] if math.isfinite(seconds) else []


def read_sampler(data: Tensor) -> Callable[[], list[float]]:
    """Measures how fast all of torch's threads together read uint8 data, in GB/s: the best of some access patterns.

    Each pattern reads a copy of its own: it must not find in the cache what another pattern or a kernel has just read,
    and must not leave a kernel's weights there.
    """
    flat = data.flatten()
    least = STEP_BYTES * max(STREAMS) * torch.get_num_threads()
    flat = flat.repeat(1 + (least - 1) // flat.numel()) if flat.numel() < least else flat
    copies = {count: flat.clone() for count in STREAMS}
    repeats = 1 + READ_BYTES // flat.numel()

    def sample() -> list[float]:
        return [max(measure_read(copy, count, repeats) for count, copy in copies.items()) / 1e9]

    return sample


def weight_read_samplers(copies: Tensor, turn: Iterator[int]) -> dict[int, Callable[[], list[float]]]:
    """Measure how fast all of torch's threads read packed weights, one whole weight at a time, in GB/s, by the streams.

    The start of the threads is included, as it is for a kernel.

    Args:
        copies: uint8 (copies, out_features, row_bytes).
        turn: The index of the next copy, shared with the kernels: nobody finds in the cache what another has just read.
    """
    flat = copies.flatten(1)
    threads, size = torch.get_num_threads(), flat.shape[1]
    streams = [count for count in STREAMS if STEP_BYTES * count * threads <= size]
    if not streams:
        streams, flat = [1], flat.repeat(1, 1 + STEP_BYTES * threads // size)
    repeats = 1 + SMALL_BYTES // size if size < SMALL_BYTES else 1
    reads = max(1, min(20, TURN_BYTES // (size * repeats)))

    def sampler(count: int) -> Callable[[], list[float]]:
        return lambda: [measure_read(flat[next(turn)], count, repeats) / 1e9 for _ in range(reads)]

    return {count: sampler(count) for count in streams}
