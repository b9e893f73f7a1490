"""What the networks reach on the test images."""

import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitlab.demo.checks import Checks
from bitlab.demo.data import Digits, Images
from bitlab.demo.training import Pair, accuracy, logits, training_mode_logits

LOWEST_ACCURACY = 95.0
LARGEST_GAP = 1.5


@dataclass(frozen=True)
class Outputs:
    """The logits of one seed's networks for the test images, (n, 10) each."""

    float_model: Tensor
    training_mode: Tensor
    packed: Tensor


@dataclass(frozen=True)
class Accuracies:
    """Percent of the test images, one entry a seed."""

    float_model: list[float]
    training_mode: list[float]
    packed: list[float]

    def means(self) -> tuple[float, float, float]:
        """Over the seeds."""
        return statistics.mean(self.float_model), statistics.mean(self.training_mode), statistics.mean(self.packed)


def evaluate(pair: Pair, digits: Digits) -> Outputs:
    """Runs float network, ternary network in training mode, and packed: deploys the ternary network on the way."""
    float_model = logits(pair.float_model, digits.test)
    training_mode = training_mode_logits(pair.ternary, digits.test)
    return Outputs(float_model, training_mode, logits(pair.ternary.deploy(), digits.test))


def check_bits(outputs: list[Outputs], pairs: list[Pair], digits: Digits, checks: Checks) -> None:
    """Training and inference agree, and an image does not depend on its batch."""
    packed = torch.cat([output.packed for output in outputs])
    training_mode = torch.cat([output.training_mode for output in outputs])
    checks.same_bits("packed weights give the bits of training mode", packed, training_mode)
    images = [Images(digits.test.x[row : row + 1], digits.test.y[row : row + 1]) for row in range(len(digits.test))]
    alone = torch.cat([logits(pairs[0].ternary, image) for image in images])
    checks.same_bits("an image alone gives the bits that it gives in a batch", alone, outputs[0].packed)


def measure(outputs: list[Outputs], digits: Digits) -> Accuracies:
    """The accuracy of every network."""
    return Accuracies(
        [accuracy(output.float_model, digits.test) for output in outputs],
        [accuracy(output.training_mode, digits.test) for output in outputs],
        [accuracy(output.packed, digits.test) for output in outputs],
    )


def check_accuracies(accuracies: Accuracies, checks: Checks) -> None:
    """Packed ternary is good, and close to float."""
    float_mean, _, packed_mean = accuracies.means()
    seeds = len(accuracies.packed)
    checks.add(
        f"packed ternary reads at least {LOWEST_ACCURACY} % (mean of {seeds})",
        packed_mean >= LOWEST_ACCURACY,
        f"{packed_mean:.2f} %",
    )
    gap = float_mean - packed_mean
    checks.add(f"it is at most {LARGEST_GAP} points below float (mean of {seeds})", gap <= LARGEST_GAP, f"{gap:.2f}")


def print_accuracies(accuracies: Accuracies, console: Console) -> None:
    """Shows the accuracies as a table."""
    table = Table(title="Test accuracy, %", title_justify="left", title_style="bold")
    table.add_column("seed")
    for name in ("float", "ternary, training mode", "ternary, packed"):
        table.add_column(name, justify="right")
    rows = zip(accuracies.float_model, accuracies.training_mode, accuracies.packed, strict=True)
    for seed, row in enumerate(rows):
        table.add_row(str(seed), *(f"{value:.2f}" for value in row))
    table.add_section()
    table.add_row("mean", *(f"[bold]{value:.2f}[/bold]" for value in accuracies.means()))
    console.print(table)
