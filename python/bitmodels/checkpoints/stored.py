"""A tensor as it lies in a file."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitcore.exceptions import FileError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class StoredTensor:
    """A name, a shape (the last dimension is adjacent), and the bytes of an encoding."""

    name: str
    shape: tuple[int, ...]
    encoding: str  # "float32", "uint8", "Q2_0 of 128", ...
    data: Bytes  # A view of the file.

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a file or directory, and what it says about them."""

    path: Path
    container: str
    metadata: Mapping[str, Any]  # config.json, or a GGUF file's key-value pairs.
    tensors: Mapping[str, StoredTensor]


def map_file(path: Path) -> Bytes:
    """The bytes of a file, read as they are needed.

    Raises:
        FileError: it is empty.
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise FileError(f"{path}: the file is empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


def release(tensor: StoredTensor) -> None:
    """Gives back the memory that holds what has been read of a mapped file; what is read again is mapped again."""
    data: Any = tensor.data
    while isinstance(data.base, np.ndarray):
        data = data.base
    if not isinstance(data.base, mmap.mmap):
        return
    begin = tensor.data.ctypes.data - data.ctypes.data
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    data.base.madvise(mmap.MADV_DONTNEED, first, begin + tensor.data.size - first)


def check_apart(path: Path, places: Mapping[str, tuple[int, int]], end: int) -> None:
    """Checks that the bytes [begin, end) of tensors lie in the file and share nothing.

    Raises:
        FileError
    """
    before, previous = 0, ""
    for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if last > end:
            raise FileError(f"{path}: {name} ends at byte {last}, and the file at {end}: it is truncated or damaged")
        if first < before and last > first:
            raise FileError(f"{path}: {name} begins at byte {first}, inside of {previous}, which ends at {before}")
        before, previous = max(before, last), name
