"""The tables."""

from rich import box
from rich.console import Console
from rich.table import Table

from bitlab.bench.contenders import Contender
from bitlab.bench.limits import unit
from bitlab.bench.results import (
    RATIOS_TO,
    SLOWER_ALLOWED_PERCENT,
    Measurement,
    OverheadMeasurement,
    Results,
    TrainingMeasurement,
    dispatch_checks,
    overall_limits,
    training_ratios,
)
from bitlab.bench.training import BITLINEAR
from bitlab.times import format_spread

RATIO_HEADINGS = ("x f32", "x bf16", "x i8")  # Of RATIOS_TO.
LONGEST_NAME = 21
UNITS = ("GB/s", "GOPS", "ns")  # Of limits, in the order of the table.


def print_machine(results: Results, console: Console) -> None:
    """What runs, where and when."""
    machine = results.machine
    table = _table("Machine", header=False)
    table.add_row("processor", f"{machine.cpu}, {machine.cores} cores for this process")
    table.add_row("CPU features", ", ".join(machine.cpu_features))
    table.add_row("last-level cache", f"{machine.last_level_cache_bytes / 2**20:.0f} MiB")
    table.add_row("system", machine.system)
    table.add_row("bitlab, torch", f"{machine.bitlab}, {machine.torch}")
    table.add_row("command", results.command)
    table.add_row("date", results.date)
    table.add_row("weights", f"from {results.weights_from}")
    console.print(table)


def print_skipped(skipped: dict[str, str], console: Console) -> None:
    """Who takes no part, and why."""
    for name, reason in skipped.items():
        console.print(f"[yellow]skipped[/yellow] {name}: {reason}", highlight=False, soft_wrap=True)


def print_limits(results: Results, console: Console) -> None:
    """Every limit for every number of threads."""
    if not results.limits:
        return
    overall = overall_limits(results.limits)
    threads = sorted({count for _, count in overall})
    names = sorted({name for name, _ in overall}, key=lambda name: (UNITS.index(unit(name)), name))
    table = _table(
        "Limits of this machine\nof a case: the median, of multiply-adds the upper decile; "
        "here the median over the cases (middle 80 %)"
    )
    table.add_column("limit")
    table.add_column("unit")
    for count in threads:
        table.add_column(_threads(count), justify="right")
    for name in names:
        values = [overall.get((name, count)) for count in threads]
        cells = [f"{v.median:.4g} ({v.low:.4g} - {v.high:.4g})" if v else "" for v in values]
        table.add_row(name, unit(name), *cells)
    console.print(table)


def print_measurements(results: Results, console: Console) -> None:
    """A table for each shape and number of threads."""
    if not results.measurements:
        return
    groups: dict[tuple[int, int, int], list[Measurement]] = {}
    for m in results.measurements:
        groups.setdefault((m.case.out_features, m.case.in_features, m.case.threads), []).append(m)
    for (out_features, in_features, threads), measurements in groups.items():
        console.print(_case_table(f"{out_features} x {in_features} (out x in), {_threads(threads)}", measurements))
    console.print(
        "* the kernel that is dispatched. time: median (middle 80 %). GB/s: of weights. GOPS: 2 x rows x out x in. "
        "limit: the larger of a read of the same weights (M) and operations / peak (A), divided by the time. x: how "
        "many times as long torch's layer takes; i8: its dynamic int8.",
        highlight=False,
    )


def _case_table(title: str, measurements: list[Measurement]) -> Table:
    table = _table(title, box_style=box.SIMPLE_HEAD)
    table.add_column("rows", justify="right")
    table.add_column("kernel or peer", overflow="fold", min_width=LONGEST_NAME)
    table.add_column("layout", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for heading in ("GB/s", "GOPS", "limit", *RATIO_HEADINGS):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for m in measurements:
        if previous is not None and m.case != previous:
            table.add_section()
        table.add_row(str(m.case.rows) if m.case != previous else "", *_cells(m))
        previous = m.case
    return table


def _cells(m: Measurement) -> list[str]:
    contender = m.contender
    percent = "" if m.bound is None else f"{m.percent_of_limit:.0f} % {'M' if m.bound.by == 'memory' else 'A'}"
    ratios = [f"{m.ratios[other]:.2f}" if other in m.ratios else "" for other in RATIOS_TO]
    time = format_spread(m.time.median, m.time.low, m.time.high)
    return [_name(contender), contender.form, time, f"{m.gb_per_s:.1f}", f"{m.gops:.1f}", percent, *ratios]


def _name(contender: Contender) -> str:
    name = contender.name
    if contender.activations == "float32" and not name.startswith("Float32"):
        name += " float32"
    if contender.dispatched:
        name = f"[bold]{name}*[/bold]"
    return name + " (registered)" if contender.registered else name


def print_dispatch(results: Results, console: Console) -> None:
    """Whether dispatch chose well."""
    checks = dispatch_checks(results.measurements)
    if not checks:
        return
    slower = [check for check in checks if not check.within_allowance]
    console.print(
        f"Dispatch: in {len(checks) - len(slower)} of {len(checks)} cases the dispatched kernel is at most "
        f"{SLOWER_ALLOWED_PERCENT:.0f} % slower than the best one.",
        highlight=False,
    )
    if not slower:
        return
    apart = [check for check in slower if not check.ranges_overlap]
    console.print(
        f"Of the {len(slower)} others, {len(slower) - len(apart)} may be noise (the middle 80 % of both times "
        f"overlap); in {len(apart)} it is slower beyond noise.",
        highlight=False,
    )
    table = _table(f"Where it is more than {SLOWER_ALLOWED_PERCENT:.0f} % slower")
    for heading in ("out x in", "rows", "threads", "activations", "layout", "dispatched", "best", "slower by", "noise"):
        table.add_column(heading)
    for check in slower:
        case = check.case
        shape = f"{case.out_features} x {case.in_features}"
        numbers = (shape, str(case.rows), str(case.threads))
        texts = (check.activations, check.layout, check.dispatched, check.best)
        noise = "may be" if check.ranges_overlap else "no"
        table.add_row(*numbers, *texts, f"[red]{check.percent_slower:.0f} %[/red]", noise)
    console.print(table)


def print_training(found: list[TrainingMeasurement], console: Console) -> None:
    """A table for each shape and number of threads."""
    if not found:
        return
    groups: dict[tuple[int, int, int], list[TrainingMeasurement]] = {}
    for m in found:
        groups.setdefault((m.case.out_features, m.case.in_features, m.case.threads), []).append(m)
    for (out_features, in_features, threads), measurements in groups.items():
        title = f"Training: forward + backward, {out_features} x {in_features} (out x in), {_threads(threads)}"
        console.print(_training_table(title, measurements))
    console.print(
        "bfloat16: under autocast. x: how many times the time or the bytes of BitLinear. kept: what autograd saves in "
        "forward for backward, each storage once, but the parameters. Gradients of x and of the weight are computed.",
        highlight=False,
    )


def _training_table(title: str, found: list[TrainingMeasurement]) -> Table:
    ratios = training_ratios(found, of=BITLINEAR)
    table = _table(title, box_style=box.SIMPLE_HEAD)
    table.add_column("rows", justify="right")
    for heading in ("precision", "layer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("time", "x time", "kept MB", "x bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for m in found:
        key = (m.case, m.precision)
        if previous is not None and key != previous:
            table.add_section()
        first = (str(m.case.rows), m.precision.removesuffix(" autocast"))
        time_ratio, bytes_ratio = ratios.get((*key, m.name), (None, None))
        table.add_row(
            *(first if key != previous else ("", "")),
            f"[bold]{m.name}[/bold]" if m.name == BITLINEAR else m.name,
            format_spread(m.time.median, m.time.low, m.time.high),
            "" if time_ratio is None else f"{time_ratio:.2f}",
            f"{m.kept_bytes / 1e6:.1f}",
            "" if bytes_ratio is None else f"{bytes_ratio:.1f}",
        )
        previous = key
    return table


def print_overhead(found: list[OverheadMeasurement], console: Console) -> None:
    """What each way of calling a tiny layer takes."""
    if not found:
        return
    table = _table("Overhead: a call of an 8 x 8 layer with 8 rows, from Python", box_style=box.SIMPLE_HEAD)
    table.add_column("mode")
    table.add_column("call")
    for heading in ("us (middle 80 %)", "above nn.Linear"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for m in found:
        if previous is not None and m.mode != previous:
            table.add_section()
        times = f"{m.time.median:.1f} ({m.time.low:.1f} - {m.time.high:.1f})"
        table.add_row(m.mode if m.mode != previous else "", m.name, times, f"{m.above_linear_us:+.1f}")
        previous = m.mode
    console.print(table)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _table(title: str, header: bool = True, box_style: box.Box = box.HEAVY_HEAD) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", show_header=header, box=box_style)
