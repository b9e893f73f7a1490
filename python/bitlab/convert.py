"""`bitlab convert`: any ternary checkpoint in, one directory out."""

import argparse
import re
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bitlab.bench.options import UsageError
from bitmodels.checkpoints.conversion import Conversion, convert_checkpoint
from bitmodels.checkpoints.parts import Part

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

INTERRUPTED = 130  # The exit code of a program that SIGINT ended, as shells report it.


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Converts, with a progress bar, and prints what became of each tensor. Returns the exit code."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # Then nothing half-written remains.
    try:
        conversion = _convert(arguments, console)
    except KeyboardInterrupt:
        console.print(f"interrupted: {arguments.target} was not written", highlight=False, markup=False)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    print_conversion(conversion, console)
    return 0


def _convert(arguments: argparse.Namespace, console: Console) -> Conversion:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name or "finishing")

        verified: list[str] = []
        conversion = convert_checkpoint(
            arguments.source,
            arguments.target,
            layout=arguments.layout,
            head=arguments.head,
            tokenizer=arguments.tokenizer,
            scales=arguments.scales,
            hidden_act=arguments.hidden_act,
            check=_verifier(arguments.source, verified) if arguments.verify else None,
            progress=progress,
        )
    conversion.notes += verified
    return conversion


def _verifier(source: Path, lines: list[str]) -> Callable[[Path], None]:
    """What compares a converted directory with its source, and adds to `lines` what it finds."""
    if missing := [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]:
        raise UsageError(f"--verify needs {missing[0]}, which is not installed: pip install 'bitlab[transformers]'")
    from bitmodels.verification import verify

    return lambda directory: lines.extend(verify(source, directory))


def print_conversion(conversion: Conversion, console: Console) -> None:
    """Prints what was converted, what each tensor became, and what had to be changed."""
    console.print(_tensors(conversion))
    before, after = conversion.bytes_before / 1e6, conversion.bytes_after / 1e6
    activations = {part.quant_config.activation_granularity for part in conversion.parts if part.quant_config}
    per = " or ".join(sorted({"per_group": "group", "per_channel": "token"}[each] for each in activations))
    lines = [
        f"{conversion.architecture}, {conversion.parameters:,} parameters, from {conversion.container}",
        f"{before:,.1f} MB became {after:,.1f} MB in {conversion.seconds:.1f} s: "
        f"{8 * conversion.bytes_after / conversion.parameters:.2f} bits per parameter",
        f"activations of ternary layers: int8, a scale per {per}",
        f"tokenizer: {conversion.tokenizer}",
        *conversion.notes,
        *([] if conversion.head_change is None else [str(conversion.head_change)]),
        f"{conversion.target}: import bitlayers.transformers, then from_pretrained() loads it",
    ]
    for line in lines:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def _tensors(conversion: Conversion) -> Table:
    table = Table()
    table.add_column("tensors", overflow="fold")
    table.add_column("number", justify="right")
    table.add_column("was", overflow="fold")
    table.add_column("is", overflow="fold")
    for column in ("parameters", "MB before", "MB after", "bits each"):
        table.add_column(column, justify="right")
    for (name, _, was, became), group in _alike(conversion.parts).items():
        parameters = sum(part.parameters for part in group)
        after = sum(part.bytes_after for part in group)
        table.add_row(
            name,
            str(len(group)),
            was,
            became,
            f"{parameters:,}",
            f"{sum(part.bytes_before for part in group) / 1e6:,.2f}",
            f"{after / 1e6:,.2f}",
            f"{8 * after / parameters:.2f}",
        )
    return table


def _alike(parts: list[Part]) -> dict[tuple[str, tuple[int, ...], str, str], list[Part]]:
    """Parts of all layers that have the same name in them, shape and fate. Norms and biases are one line."""
    found: dict[tuple[str, tuple[int, ...], str, str], list[Part]] = {}
    for part in parts:
        key: tuple[str, tuple[int, ...], str, str]
        if len(part.shape) == 1:
            key = ("norms and biases", (), part.source, _DTYPES[part.outputs[0].dtype])
        else:
            name = re.sub(r"^model\.layers\.\d+\.(\w+\.)?", "", part.name)
            key = (f"{name} {part.shape[0]} x {part.shape[1]}", part.shape, part.source, _became(part))
        found.setdefault(key, []).append(part)
    return found


def _became(part: Part) -> str:
    config = part.quant_config
    if config is None:
        return "int8, scale per row" if part.kind == "int8" else _DTYPES[part.outputs[0].dtype]
    scales = {"per_tensor": "tensor", "per_channel": "row"}.get(config.weight_granularity, str(config.group_size))
    return f"ternary {part.layout}, scale per {scales}"
