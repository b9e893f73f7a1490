"""libbitlab.so, the C API of bindings/c, loaded by ctypes. Needs no torch."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from bitcore.exceptions import FileError, KernelNotFoundError, QuantizationError, StateError

PATH = Path(__file__).parent / "lib" / "libbitlab.so"

CANCELLED = 7

# What a bitlab_status stands for.
_ERRORS: dict[int, type[Exception]] = {
    1: QuantizationError,
    2: MemoryError,
    4: FileError,
    5: StateError,
    6: KernelNotFoundError,
}


def call(name: str, *arguments: Any) -> int:
    """Calls a function that returns a bitlab_status. Returns it: 0, or CANCELLED.

    Raises:
        BitLabError, MemoryError: as the status says, with its message.
        RuntimeError: a fault of BitLab.
    """
    status: int = getattr(library(), name)(*arguments)
    if status in (0, CANCELLED):
        return status
    message = library().bitlab_last_error().decode(errors="surrogateescape")
    raise _ERRORS.get(status, RuntimeError)(message)


def declare(name: str, *types: Any) -> None:
    """Says what a function takes: ctypes then converts, and refuses what does not fit."""
    getattr(library(), name).argtypes = types


@cache
def library() -> ctypes.CDLL:
    """The shared object.

    Raises:
        ImportError: it has not been built, or does not fit this system.
    """
    try:
        loaded = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise ImportError(f"BitLab's engine cannot be loaded ({error}): run `make build`", name="bitcore") from error
    loaded.bitlab_last_error.restype = ctypes.c_char_p
    return loaded
