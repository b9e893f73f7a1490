"""Finds and loads the shared object that holds the operators `torch.ops.bitcore.*`."""

import platform
import re
import struct
import sys
from pathlib import Path

import torch

PATH = Path(__file__).parent / "lib" / "libbitcore_torch.so"
OLDEST_TORCH = (2, 10)
"""Its stable ABI is what the shared object is compiled against."""

_MACHINES = {"x86_64": 62, "aarch64": 183}
"""What Linux calls a processor, and what an ELF header does."""

_LOADED_SEGMENT = 1


def load() -> None:
    """Registers the operators with torch.

    Raises:
        ImportError: torch is too old; the shared object has not been built, is damaged, or is built for another
            platform. One line that says what to do.
    """
    version = torch.__version__
    if _major_and_minor(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"bitcore needs torch {oldest} or later, this is torch {version}: install a later one")
    if not PATH.is_file():
        raise ImportError(f"bitcore's compiled operators are missing ({PATH}): {_remedy('make build')}")
    if sys.platform == "linux" and (fault := _fault_of(PATH)):
        raise ImportError(f"bitcore's compiled operators {fault} ({PATH}): {_remedy('make clean build')}")
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ImportError(
            f"bitcore's compiled operators do not fit this system or torch {version} ({reason}): "
            f"{_remedy('make clean build')}"
        ) from error


def _major_and_minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _remedy(command: str) -> str:
    """What to do: in a source tree a command, elsewhere another installation."""
    in_tree = (Path(__file__).parents[2] / "Makefile").is_file()
    return f"run `{command}`" if in_tree else "install bitlab's wheel for this platform again"


def _fault_of(path: Path) -> str | None:
    """What keeps an ELF file from being loaded; torch would not say, and a truncated one would end the process."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return "are no 64-bit ELF file"
        (machine,) = struct.unpack_from("<H", header, 18)
        here = platform.machine()
        if machine != _MACHINES.get(here, machine):
            names = {number: name for name, number in _MACHINES.items()}
            return f"are built for {names.get(machine, f'ELF machine {machine}')}, this is {here}"
        (first,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(first)
        segments = file.read(size * count)
    if size < 56 or len(segments) < size * count:
        return "are truncated"
    for start in range(0, len(segments), size):
        (kind,) = struct.unpack_from("<I", segments, start)
        offset, length = struct.unpack_from("<Q16xQ", segments, start + 8)
        if kind == _LOADED_SEGMENT and offset + length > path.stat().st_size:
            return "are truncated"
    return None
