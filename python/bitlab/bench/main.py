"""The benchmark from beginning to end."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from bitcore.kernels.base import BitKernelBase
from bitlab.bench import contenders, machine, overhead, report, results, training
from bitlab.bench.contenders import Contender
from bitlab.bench.layer import Prepared, make_layer, make_x
from bitlab.bench.limits import (
    READ,
    READ_IN_CACHE,
    ROUND_TRIP,
    peak_sampler,
    read_sampler,
    round_trip_sampler,
    weight_read,
    weight_read_samplers,
)
from bitlab.bench.options import BenchOptions, UsageError
from bitlab.bench.peers import Peer, selected
from bitlab.bench.results import Case, Limit, Results
from bitlab.bench.timing import CallSampler, Sampler, take_turns
from bitlab.times import spread

JSON_FILE, PICTURE_FILE = "bench.json", "roofline.png"


def run(options: BenchOptions, command: Sequence[str], console: Console) -> int:
    """Runs the benchmark. Returns 0.

    Args:
        options: What to measure.
        command: The command line, for the record.
        console: Where tables go.

    Raises:
        UsageError: the options name a kernel that cannot be measured, a module that cannot be imported, or nothing.
    """
    contenders.import_modules(options.imports)
    found = _new_results(options, command)
    measure = _measure_layers if options.training or options.overhead else _prepare_kernels(found)
    options.output.mkdir(parents=True, exist_ok=True)
    report.print_machine(found, console)
    start = time.perf_counter()
    with _threads_kept():
        measure(found, console)
    found.seconds = time.perf_counter() - start
    report.print_limits(found, console)
    report.print_measurements(found, console)
    report.print_dispatch(found, console)
    report.print_training(found.training, console)
    report.print_overhead(found.overhead, console)
    report.print_skipped(found.skipped, console)
    results.write(found, options.output / JSON_FILE)
    console.print(f"Figures: {options.output / JSON_FILE}", highlight=False, soft_wrap=True)
    if found.measurements:
        _draw(found, console)
    console.print(f"Took {found.seconds:.0f} s.", highlight=False)
    return 0


def _new_results(options: BenchOptions, command: Sequence[str]) -> Results:
    weights_from = (
        "the cache: one copy" if options.in_cache else "memory: copies of more than twice the last-level cache"
    )
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Results(machine.describe(), shlex.join(command), date, options, weights_from)


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare_kernels(found: Results) -> Callable[[Results, Console], None]:
    """Finds kernels and peers, and returns what measures them."""
    kernels = contenders.choose_kernels(found.options)
    peers, missing = contenders.available(selected(found.options.peers))
    found.skipped.update(missing)

    def measure(found: Results, console: Console) -> None:
        with torch.inference_mode():
            _measure(found, kernels, peers, console)

    return measure


def _measure_layers(found: Results, console: Console) -> None:
    """The layer as a whole, in training and where it is tiny."""
    options = found.options
    parts = options.training + options.overhead
    with _progress(console) as progress:
        if options.training:
            cases = len(options.shapes) * len(options.rows) * len(options.threads) * len(training.PRECISIONS)
            task = progress.add_task("", total=cases)
            found.skipped.update(training.available_layers()[1])
            share = replace(options, seconds=options.seconds / parts)
            found.training += training.measure(share, lambda: progress.advance(task))
        if options.overhead:
            task = progress.add_task("", total=1)
            found.overhead += overhead.measure(replace(options, seconds=options.seconds / parts))
            progress.advance(task)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("cases"), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _measure(found: Results, kernels: dict[str, list[BitKernelBase]], peers: list[Peer], console: Console) -> None:
    options = found.options
    rotated = 0 if options.in_cache else 2 * found.machine.last_level_cache_bytes
    per_shape = list(product(options.threads, options.rows))
    with _progress(console) as progress:
        task = progress.add_task("", total=len(options.shapes) * len(per_shape))
        for out_features, in_features in options.shapes:
            layer = make_layer(out_features, in_features, rotated)
            pools, reasons = contenders.layouts_of(layer, options.layouts)
            prepared = contenders.prepare_kernels(layer, kernels, pools, options.weights)
            of_peers, refused = contenders.prepare_peers(layer, peers)
            where = f" at {out_features} x {in_features}"
            found.skipped.update({name + where: reason for name, reason in (reasons | refused).items()})
            prepared |= of_peers
            if not prepared:
                raise UsageError(f"nothing to measure{where}: no kernel, layout or peer fits")
            array = next(iter(pools.values())) if pools else contenders.pack_copies(layer, "2bit")
            for threads, rows in per_shape:
                torch.set_num_threads(threads)
                _measure_case(found, Case(out_features, in_features, rows, threads), prepared, pools, array.copies)
                progress.advance(task)


def _measure_case(
    found: Results, case: Case, prepared: dict[Contender, Prepared], pools: dict[str, contenders.Pool], array: Tensor
) -> None:
    """Limits and contenders in turns. pools: by layout; array: what the limit of those without a layout reads."""
    options = found.options
    read = READ_IN_CACHE if options.in_cache else READ
    samplers: dict[str | tuple[str, int] | Contender, Sampler] = {read: read_sampler(array)}
    for layout, pool in pools.items():
        for streams, sampler in weight_read_samplers(pool.copies, pool.turn).items():
            samplers[weight_read(layout, options.in_cache), streams] = sampler
    if round_trip := round_trip_sampler():
        samplers[ROUND_TRIP] = round_trip
    paths = dict.fromkeys(contender.path for contender in prepared if contender.path is not None)
    samplers |= {path: peak_sampler(path) for path in paths}
    x = make_x(case.rows, case.in_features)
    samplers |= {contender: CallSampler(held.bind(x)) for contender, held in prepared.items()}
    cases = len(options.shapes) * len(options.rows) * len(options.threads)
    samples = take_turns(samplers, options.repetitions, options.seconds / cases)
    limits: dict[str, Limit] = {}
    for key, values in samples.items():
        if isinstance(key, Contender) or not values:
            continue
        name = key if isinstance(key, str) else key[0]
        limit = Limit(case, name, spread(values))
        if name not in limits or limit.reached > limits[name].reached:  # Of a read the fastest access pattern.
            limits[name] = limit
    found.limits += limits.values()
    found.measurements += results.with_ratios(
        [
            results.measurement(
                case,
                contender,
                held.weight_bytes,
                samples[contender],
                limits,
                weight_read(contender.layout, options.in_cache) if contender.layout in pools else read,
            )
            for contender, held in prepared.items()
        ]
    )


def _draw(found: Results, console: Console) -> None:
    path = found.options.output / PICTURE_FILE
    try:
        from bitlab.bench import plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        console.print("No picture: it needs matplotlib (pip install 'bitlab[demo]')", highlight=False)
        return
    plot.draw(path, found)
    console.print(f"Picture: {path}", highlight=False, soft_wrap=True)
