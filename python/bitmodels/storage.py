"""Reading and writing the files of a saved model. No pickle: safetensors and JSON."""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitcore.exceptions import QuantizationError

MODEL_FILE = "model.safetensors"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, which then takes its place: a reader never sees half a file."""
    # Random: threads share a process id, and so do processes of different containers on one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # As any new file here; safetensors would make it private.
        write(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        QuantizationError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise QuantizationError(f"{path}: not a complete safetensors file: {error}") from error


def _flush(path: Path) -> None:
    """Waits until the file is on the disk: a crash after the renaming must not leave an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
