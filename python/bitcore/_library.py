"""Finds and loads the shared object that holds the operators `torch.ops.bitcore.*`."""

from pathlib import Path

import torch

PATH = Path(__file__).parent / "lib" / "libbitcore_torch.so"


def load() -> None:
    """Registers the operators with torch.

    Raises:
        ImportError: the shared object has not been built.
    """
    if not PATH.is_file():
        raise ImportError(f"bitcore's compiled operators are missing ({PATH}): run `make build`")
    torch.ops.load_library(str(PATH))
