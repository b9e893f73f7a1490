"""The demo's claims, each of which passes or fails."""

from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One claim and what was found."""

    claim: str
    passed: bool
    finding: str


@dataclass
class Checks:
    """The claims so far."""

    results: list[Check] = field(default_factory=list)

    def add(self, claim: str, passed: bool, finding: str) -> None:
        """Notes a claim."""
        self.results.append(Check(claim, passed, finding))

    def same_bits(self, claim: str, output: Tensor, expected: Tensor) -> None:
        """Notes that two float32 outputs are the same to the last bit."""
        if output.shape != expected.shape:
            self.add(claim, False, f"shape {tuple(output.shape)}, expected {tuple(expected.shape)}")
            return
        different = int((output.view(torch.int32) != expected.view(torch.int32)).sum())
        self.add(claim, different == 0, f"{different} of {output.numel():,} outputs differ")

    @property
    def all_passed(self) -> bool:
        """Whether no claim failed."""
        return all(check.passed for check in self.results)

    def print(self, console: Console) -> None:
        """Shows the claims as a table."""
        table = Table(title="Checks", title_justify="left", title_style="bold")
        table.add_column("")
        table.add_column("claim")
        table.add_column("found")
        for check in self.results:
            mark = "[green]passed[/green]" if check.passed else "[bold red]FAILED[/bold red]"
            table.add_row(mark, check.claim, check.finding)
        console.print(table)
