"""A safetensors file that is written tensor by tensor, piece by piece, without holding any of them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64

_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


class Output(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # As safetensors names it.
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _BYTES[self.dtype]


class SafetensorsStream:
    """Writes a file whose tensors are known before their contents are.

    The data begin at a multiple of 64 bytes, and tensors whose size is a multiple of 64 come first: where the file is
    mapped, each of those begins on a cache line. The room for all of it is taken at once, so that a full disk shows
    before anything is computed.

    Raises:
        OSError: there is no room, or the file cannot be written.
    """

    def __init__(self, path: Path, outputs: Iterable[Output]) -> None:
        ordered = sorted(outputs, key=lambda each: (each.nbytes % ALIGNMENT != 0, -_BYTES[each.dtype]))
        self._places: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in ordered:
            begin, end = end, end + Output(name, dtype, shape).nbytes
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            self._places[name], self._ends[name] = begin, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._begin = 8 + len(text)
        self.nbytes = self._begin + end
        self._file = path.open("wb", buffering=0)
        try:
            self._take_room(path)
            self._write_at(0, len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._file.close()
            raise

    def _take_room(self, path: Path) -> None:
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        except OSError as error:
            needed = f"{error.strerror} (the file needs {self.nbytes:,} bytes)"
            raise OSError(error.errno, needed, str(path)) from error

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Writes what follows of a tensor."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        assert self._places[name] + len(content) <= self._ends[name]
        self._write_at(self._begin + self._places[name], content.data)
        self._places[name] += len(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert self._places == self._ends  # Every tensor is complete.
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _write_at(self, place: int, content: bytes | memoryview) -> None:
        self._file.seek(place)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]
