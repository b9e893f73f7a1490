"""`bitlab inspect`: what a checkpoint is, and what BitLab can do with it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitmodels.checkpoints import Group, Report, inspect_checkpoint


def run(path: Path, console: Console) -> int:
    """Prints three tables. Returns the exit code."""
    report = inspect_checkpoint(path)
    console.print(_facts(report))
    console.print(_groups(report.groups))
    for note in report.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    return 0


def _facts(report: Report) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("checkpoint", str(report.path)),
        ("container", report.container),
        ("architecture", report.architecture),
        ("scales of ternary weights", report.scales),
        ("tokenizer", report.tokenizer),
    ):
        table.add_row(name, value)
    return table


def _groups(groups: list[Group]) -> Table:
    table = Table()
    table.add_column("tensors", overflow="fold")
    for column in ("number", "parameters", "MB", "bits each", "-1, 0, +1", "scales"):
        table.add_column(column, justify="right")
    for group in groups:
        table.add_row(
            group.kind,
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            f"{group.bytes / 1e6:,.2f}",
            f"{8 * group.bytes / group.parameters:.2f}" if group.parameters else "",
            _shares(group),
            _range(group),
        )
    return table


def _shares(group: Group) -> str:
    return "" if group.codes is None else ", ".join(f"{100 * share:.1f} %" for share in group.codes.shares)


def _range(group: Group) -> str:
    codes = group.codes
    if codes is None or codes.largest_scale == 0.0:
        return ""
    return f"{codes.smallest_scale:.3g} to {codes.largest_scale:.3g}"
