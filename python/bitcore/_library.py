"""Finds and loads the shared object that holds the operators `torch.ops.bitcore.*`."""

import re
import struct
from pathlib import Path

import torch

PATH = Path(__file__).parent / "lib" / "libbitcore_torch.so"
OLDEST_TORCH = (2, 10)
"""Its stable ABI is what the shared object is compiled against."""

BUILD = "pip install scikit-build-core && pip install --no-build-isolation ."
"""The command that builds the operators for the torch at hand, in BitLab's source folder."""


def load() -> None:
    """Registers the operators with torch.

    Raises:
        ImportError: torch is too old; the shared object has not been built, is damaged, or does not fit this system or
            this torch. One line that says what to do.
    """
    version = torch.__version__
    if _major_and_minor(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise _error(f"bitcore needs torch {oldest} or later, this is torch {version}: install a later one")
    if not PATH.is_file():
        raise _error(f"bitcore's torch operators have not been built ({PATH}): {_remedy('make build')}")
    if _is_truncated(PATH):
        raise _error(f"bitcore's torch operators are truncated ({PATH}): {_remedy('make clean build')}")
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        remedy = _remedy("make clean build")
        raise _error(
            f"bitcore's torch operators do not fit this system or torch {version} ({reason}): {remedy}"
        ) from error


def _error(message: str) -> ImportError:
    return ImportError(message, name="bitcore", path=str(PATH))


def _major_and_minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _remedy(command: str) -> str:
    """What to do: the command in a source tree with a Makefile; elsewhere the one that installs."""
    in_tree = (Path(__file__).parents[2] / "Makefile").is_file()
    return f"run `{command}`" if in_tree else f"in BitLab's source folder run `{BUILD}`"


def _is_truncated(path: Path) -> bool:
    """Whether the end of an ELF file is missing: the table of its sections. Loading it would end the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return header.startswith(b"\x7fELF") and sections + size * count > path.stat().st_size
