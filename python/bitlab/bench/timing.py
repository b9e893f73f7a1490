"""Subjects take turns: one turn of each, then the next round. What disturbs the machine disturbs all of them.

Every round has another order, so that nobody always comes after the same one.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from bitlab.bench.layer import Call

Sampler = Callable[[], list[float]]
"""One turn: the samples that it took."""

K = TypeVar("K")

LEAST_ROUNDS = 3
TURN_US = 2000.0  # Calls of a turn: as many as fit, so that code and branch history are warm as they are in a model,
MOST_CALLS = 20  # but at most these,
LONG_CALL_US = 50_000.0  # and where one call takes this long, no call to warm up.


class CallSampler:
    """Times calls, in microseconds."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._time()  # The first call may allocate and compile.
        trial = self._time()
        self._warms_up = trial < LONG_CALL_US
        self._calls = max(1, min(MOST_CALLS, int(TURN_US / trial)))

    def __call__(self) -> list[float]:
        """One turn."""
        if self._warms_up:
            self._call()
        return [self._time() for _ in range(self._calls)]

    def _time(self) -> float:
        start = time.perf_counter_ns()
        self._call()
        return (time.perf_counter_ns() - start) / 1e3


class BatchSampler:
    """Times calls that take few microseconds: a sample is the mean of as many as hide the clock's own time."""

    CALLS = 100

    def __init__(self, call: Call) -> None:
        self._call = call
        self()  # The first calls may allocate and compile.

    def __call__(self) -> list[float]:
        """One turn: one sample, in microseconds."""
        call = self._call
        start = time.perf_counter_ns()
        for _ in range(self.CALLS):
            call()
        return [(time.perf_counter_ns() - start) / 1e3 / self.CALLS]


def rounds(repetitions: int | None, seconds: float) -> Iterator[None]:
    """So many rounds, or as many as begin within the seconds, but a few at least."""
    start = time.perf_counter()
    done = 0
    while (
        done < repetitions if repetitions is not None else done < LEAST_ROUNDS or time.perf_counter() - start < seconds
    ):
        yield
        done += 1


def take_turns(samplers: Mapping[K, Sampler], repetitions: int | None, seconds: float) -> dict[K, list[float]]:
    """All samples of every subject."""
    samples: dict[K, list[float]] = {key: [] for key in samplers}
    order, generator = list(samplers), random.Random(0)
    for _ in rounds(repetitions, seconds):
        generator.shuffle(order)
        for key in order:
            samples[key] += samplers[key]()
    return samples
