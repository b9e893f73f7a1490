"""The C++ program `run_bitmlp`: where it is, and how to run it."""

import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitcore
from bitcore.exceptions import BitLabError

NAME = "run_bitmlp"
TIMEOUT_S = 60


def find_program() -> Path:
    """The program of the source tree's build, of the installed package, or on the PATH.

    Raises:
        BitLabError: it is nowhere.
    """
    package = Path(bitcore.__file__).resolve().parent
    places = [package.parents[1] / "build" / "tools" / NAME, package / "bin" / NAME]
    for place in places:
        if place.is_file():
            return place
    if found := shutil.which(NAME):
        return Path(found)
    raise BitLabError(f"the C++ program {NAME} is neither at {places[0]} nor at {places[1]}; `make build` builds it")


def run_program(
    model: Path, x: Tensor, folder: Path, threads: int = 1, kernel: str | None = None
) -> tuple[Tensor, str]:
    """Runs a saved BitMLP over x in a process of its own, with no Python in it.

    Args:
        model: The directory that `save_pretrained` wrote.
        x: (rows, in_channels).
        folder: Where the files that carry x and y are written.
        threads: How many threads the program uses.
        kernel: A kernel's name; None: the registry's choice.

    Returns:
        y, (rows, out_channels), and the line that the program prints.

    Raises:
        BitLabError: the program is missing or fails.
    """
    x_file, y_file = folder / "input.safetensors", folder / "output.safetensors"
    save_file({"x": x.contiguous()}, x_file)
    command = [str(find_program()), str(model), str(x_file), str(y_file), "--threads", str(threads)]
    command += ["--kernel", kernel] if kernel else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise BitLabError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return load_file(y_file)["y"].to(torch.float32), done.stdout.strip()
