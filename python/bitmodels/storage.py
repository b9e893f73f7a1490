"""Reading and writing the files of a saved model. No pickle: safetensors and JSON."""

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from bitcore.exceptions import FileError, QuantizationError

MODEL_FILE = "model.safetensors"

_DEFAULTS_LOCK = threading.RLock()  # The default dtype belongs to the whole process.


def require_path(directory: object) -> Path:
    """A directory's path: str, bytes or any `os.PathLike`.

    Raises:
        QuantizationError: it is none of them, empty, or holds a null character.
    """
    if not isinstance(directory, str | bytes | os.PathLike):
        raise QuantizationError(f"directory is {directory!r}, expected a str, bytes or os.PathLike")
    path = os.fsdecode(directory)
    if not path or "\0" in path:
        raise QuantizationError(f"directory is {directory!r}, expected the path of a directory")
    return Path(path)


def write_together(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Fills a file beside each path; when all are complete, they take their places in the given order.

    A reader never sees half a file, and a disk that fills up leaves what there was.

    Raises:
        OSError: a file cannot be written. No temporary file remains.
    """
    # Random: threads share a process id, and so do processes of different containers on one file system.
    suffix = secrets.token_hex(8)
    temporaries = {path: path.with_name(f".{path.name}.{suffix}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            _write(temporaries[path], write)
        for path, temporary in temporaries.items():
            temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # The error that is on its way says more.
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes one text file, beside its place and then renamed.

    Raises:
        OSError: it cannot be written. What was there before is still there.
    """
    write_together({path: lambda temporary: _write_utf8(temporary, text)})


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"(?:code: |os error )(\d+)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, in memory of their own: the file may change afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is truncated, no safetensors file, or changes while it is read.
    """
    content = _read_unchanging(path)
    try:
        loaded = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError, RecursionError, KeyError, RuntimeError) as error:
        raise FileError(f"{path}: not a complete safetensors file: {error}") from error
    del content
    # Copies, one at a time: storages that torch owns can be resized, as FSDP does.
    return {name: loaded.pop(name).clone() for name in list(loaded)}, header.get("__metadata__") or {}


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 on the CPU and ordinary tensors, whatever the caller's default dtype, device and inference mode are."""
    with _DEFAULTS_LOCK, torch.device("cpu"), torch.inference_mode(False):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _read_unchanging(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(content) != after.st_size:
        raise FileError(f"{path}: changed while it was read")
    return content


def _write(temporary: Path, write: Callable[[Path], None]) -> None:
    temporary.touch()
    mode = temporary.stat().st_mode  # As any new file here; safetensors would make it private.
    write(temporary)
    temporary.chmod(mode)
    # A crash after the renaming must not leave an empty file.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
