"""The shared object that measures what the machine can do at most. Its threads are torch's, as the kernels' are.

Built from benchmarks/limits; `bitlab bench` alone loads it.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitcore.exceptions import BitLabError

PATH = Path(__file__).parents[1] / "lib" / "libbitlab_limits.so"
TORCH = "libtorch_cpu.so"  # The name under which it is in this process already.
STREAMS = (1, 2, 4, 8)  # Which one reads fastest depends on the machine: the limit is the best of them.
MOST_REPEATS = 1_000_000


@dataclass(frozen=True)
class MultiplyAdds:
    """A loop of one kind of multiply-add; operations: two per multiply-add, of one round."""

    index: int
    name: str
    supported: bool
    operations: int


@cache
def multiply_adds() -> dict[str, MultiplyAdds]:
    """Every loop that this architecture has, by name, whether this CPU runs it or not.

    Raises:
        BitLabError: the shared object is missing or does not fit this system.
    """
    library = _library()
    loops = [
        MultiplyAdds(
            index,
            library.bitlab_limits_name(index).decode(),
            bool(library.bitlab_limits_supported(index)),
            library.bitlab_limits_operations(index),
        )
        for index in range(library.bitlab_limits_count())
    ]
    return {loop.name: loop for loop in loops}


def measure_multiply_adds(name: str, rounds: int) -> float:
    """Operations per second of all threads together, each of which runs a loop `rounds` times.

    Raises:
        ValueError: the loop does not exist or does not run on this CPU, or rounds is below 1.
    """
    loop = multiply_adds().get(name)
    if loop is None:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(multiply_adds())}")
    if not loop.supported:
        raise ValueError(f"name is {name!r}, which this CPU cannot run")
    _require_positive(rounds, "rounds")
    per_second: float = _library().bitlab_limits_multiply_adds(loop.index, rounds, *_threads())
    return per_second


def measure_read(data: Tensor, streams: int, repeats: int) -> float:
    """Bytes per second of all threads together, each of which reads its share of contiguous uint8 data `repeats` times.

    A share is read as 1, 2, 4 or 8 streams side by side.

    Raises:
        ValueError: the data is too short for the threads and streams, or an argument is none of the above.
    """
    if data.dtype != torch.uint8 or data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError(
            f"data is {data.dtype} of strides {data.stride()} on {data.device}, expected a contiguous uint8 CPU tensor"
        )
    if streams not in STREAMS:
        raise ValueError(f"streams is {streams}, expected 1, 2, 4 or 8")
    _require_positive(repeats, "repeats")
    least = _library().bitlab_limits_least_bytes(streams, torch.get_num_threads())
    if data.numel() < least:
        raise ValueError(f"data has {data.numel()} bytes, expected at least {least}")
    per_second: float = _library().bitlab_limits_read(data.data_ptr(), data.numel(), streams, repeats, *_threads())
    return per_second


def measure_round_trip(repeats: int) -> float:
    """Seconds that a cache line takes from the first thread to the slowest of the others and back: the median of some.

    Infinity if not all threads run at a time.

    Raises:
        ValueError: torch has one thread, or repeats is not 1 to a million.
    """
    _require_positive(repeats, "repeats")
    if repeats > MOST_REPEATS:
        raise ValueError(f"repeats is {repeats}, expected at most {MOST_REPEATS}")
    if torch.get_num_threads() < 2:
        raise ValueError("torch has 1 thread, expected at least 2")
    seconds: float = _library().bitlab_limits_round_trip(repeats, *_threads())
    return seconds


def _threads() -> tuple[int, ctypes.c_void_p]:
    """How many threads torch has, and the function of its stable ABI that runs a task on them."""
    parallel_for = ctypes.CDLL(TORCH).torch_parallel_for
    return torch.get_num_threads(), ctypes.cast(parallel_for, ctypes.c_void_p)


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise BitLabError(f"the limits of this machine cannot be measured, install bitlab again ({error})") from error
    index, count, size, pointer = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    signatures = {
        "bitlab_limits_count": (ctypes.c_int, []),
        "bitlab_limits_name": (ctypes.c_char_p, [index]),
        "bitlab_limits_supported": (ctypes.c_int, [index]),
        "bitlab_limits_operations": (ctypes.c_int64, [index]),
        "bitlab_limits_multiply_adds": (ctypes.c_double, [index, size, count, pointer]),
        "bitlab_limits_least_bytes": (ctypes.c_int64, [count, count]),
        "bitlab_limits_read": (ctypes.c_double, [pointer, size, count, size, count, pointer]),
        "bitlab_limits_round_trip": (ctypes.c_double, [count, count, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _require_positive(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
