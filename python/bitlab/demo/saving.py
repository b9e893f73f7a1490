"""Saves both networks and loads the ternary one again."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from bitlab.demo.checks import Checks
from bitlab.demo.data import Digits
from bitlab.demo.training import Pair, logits
from bitmodels import AutoBitModel
from bitmodels.storage import MODEL_FILE

FLOAT_FOLDER, TERNARY_FOLDER = "float", "ternary"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the two model files."""

    float_model: int
    ternary: int


def save(pair: Pair, output: Path) -> Sizes:
    """Writes `float/model.safetensors`, and `ternary/` as `from_pretrained` reads it."""
    float_file = output / FLOAT_FOLDER / MODEL_FILE
    float_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(pair.float_model.state_dict(), float_file)
    pair.ternary.save_pretrained(output / TERNARY_FOLDER)
    return Sizes(float_file.stat().st_size, (output / TERNARY_FOLDER / MODEL_FILE).stat().st_size)


def check_saved(output: Path, digits: Digits, expected: Tensor, checks: Checks) -> None:
    """The saved network gives the bits of the one in memory."""
    model = AutoBitModel.from_pretrained(output / TERNARY_FOLDER)
    checks.same_bits("the saved model, loaded again, gives the same bits", logits(model, digits.test), expected)


def print_sizes(sizes: Sizes, output: Path, console: Console) -> None:
    """Shows both file sizes."""
    console.print(
        f"Saved to {output}: float {sizes.float_model:,} bytes, ternary {sizes.ternary:,} bytes, "
        f"{sizes.float_model / sizes.ternary:.1f} times smaller",
        highlight=False,
    )
