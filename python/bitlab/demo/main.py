"""The demo from beginning to end."""

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from bitcore.exceptions import BitLabError
from bitcore.kernels import KernelRegistry
from bitlab import __version__
from bitlab.demo import evaluation, plot, saving, timing
from bitlab.demo.checks import Checks
from bitlab.demo.data import Digits, load
from bitlab.demo.program import run_program
from bitlab.demo.timing import Timing
from bitlab.demo.training import CONFIG, Pair, train_pair
from bitmodels.storage import write_text

PICTURE_FILE, RESULTS_FILE = "demo.png", "results.json"


@dataclass(frozen=True)
class DemoOptions:
    """What the command line sets."""

    output: Path = Path("demo-output")
    seeds: int = 5
    epochs: int = 40
    with_timing: bool = True


def run(options: DemoOptions, console: Console) -> int:
    """Runs the demo. Returns 0, or 1 where a check failed."""
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    checks = Checks()
    digits = load()
    _print_data(digits, console)

    pairs = _train(digits, options, console)
    outputs = [evaluation.evaluate(pair, digits) for pair in pairs]
    evaluation.check_bits(outputs, pairs, digits, checks)
    accuracies = evaluation.measure(outputs, digits)
    evaluation.check_accuracies(accuracies, checks)
    evaluation.print_accuracies(accuracies, console)

    sizes = saving.save(pairs[0], options.output)
    saving.check_saved(options.output, digits, outputs[0].packed, checks)
    saving.print_sizes(sizes, options.output, console)
    from_cpp = _run_cpp(options.output / saving.TERNARY_FOLDER, digits, outputs[0].packed, checks, console)

    timings = _time(console) if options.with_timing else []
    _draw(options.output / PICTURE_FILE, pairs[0], accuracies, digits, from_cpp, timings)
    _write_results(options, accuracies, sizes, timings, checks)
    checks.print(console)
    _print_end(options.output, time.perf_counter() - start, console)
    return 0 if checks.all_passed else 1


def _print_data(digits: Digits, console: Console) -> None:
    console.rule("[bold]BitLab demo: a ternary network on handwritten digits")
    console.print(
        f"{len(digits.train)} images to train on, {len(digits.validation)} for the curves, {len(digits.test)} to test. "
        f"A float and a ternary MLP, {' - '.join(map(str, CONFIG.widths))}.",
        highlight=False,
    )


def _progress(unit: str, console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _train(digits: Digits, options: DemoOptions, console: Console) -> list[Pair]:
    """One pair of networks a seed."""
    with _progress("epochs", console) as progress:
        task = progress.add_task("Training", total=2 * options.epochs * options.seeds)
        return [
            train_pair(digits, seed, options.epochs, lambda: progress.advance(task)) for seed in range(options.seeds)
        ]


def _run_cpp(model: Path, digits: Digits, expected: Tensor, checks: Checks, console: Console) -> Tensor | None:
    """Runs the saved network in the C++ program, on one thread and on all. Returns its logits where it ran."""
    output = None
    for threads in sorted({1, os.cpu_count() or 1}):
        claim = f"the C++ program gives the same bits, threads: {threads}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                output, line = run_program(model, digits.test.x, Path(folder), threads)
        except BitLabError as error:
            checks.add(claim, False, str(error))
            continue
        console.print(f"C++: {line}", highlight=False)
        checks.same_bits(claim, output, expected)
    return output


def _time(console: Console) -> list[Timing]:
    """Times the layer and shows the result."""
    with _progress("cases", console) as progress:
        task = progress.add_task("Timing  ", total=len(timing.SHAPES) * len(timing.ROWS))
        timings = timing.measure(lambda: progress.advance(task))
    timing.print_timings(timings, console)
    return timings


def _draw(
    path: Path,
    pair: Pair,
    accuracies: evaluation.Accuracies,
    digits: Digits,
    outputs: Tensor | None,
    timings: list[Timing],
) -> None:
    float_mean, _, packed_mean = accuracies.means()
    plot.draw(
        path,
        {"float": pair.float_history, "ternary": pair.ternary_history},
        {"float": float_mean, "ternary": packed_mean},
        digits.test,
        outputs,
        timings,
    )


def _write_results(
    options: DemoOptions,
    accuracies: evaluation.Accuracies,
    sizes: saving.Sizes,
    timings: list[Timing],
    checks: Checks,
) -> None:
    """Everything that was measured, and where, as JSON."""
    results = {
        "environment": _environment(),
        "seeds": options.seeds,
        "epochs": options.epochs,
        "test_accuracy_percent": asdict(accuracies),
        "file_bytes": asdict(sizes),
        "timings": [asdict(entry) for entry in timings],
        "checks": [asdict(check) for check in checks.results],
    }
    write_text(options.output / RESULTS_FILE, json.dumps(results, indent=2) + "\n")


def _environment() -> dict[str, Any]:
    return {
        "bitlab": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "kernel": KernelRegistry.get_kernel_for_config(CONFIG.quant_config).name,
    }


def _print_end(output: Path, seconds: float, console: Console) -> None:
    console.print(f"Picture: {output / PICTURE_FILE}", highlight=False, soft_wrap=True)
    console.print(f"Figures: {output / RESULTS_FILE}", highlight=False, soft_wrap=True)
    console.print(f"Took {seconds:.0f} s.", highlight=False)
