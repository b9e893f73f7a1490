"""The roofline: operations per byte of weights against GOPS, under the limits of the machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitlab.bench.limits import READ, READ_IN_CACHE, is_read, unit
from bitlab.bench.results import Measurement, Results, overall_limits
from bitlab.style import BLUE, GREY, INK, ORANGE, RED, STYLE

matplotlib.use("Agg")

MOST_PANELS = 3  # Thread counts shown, the first ones.
ROOM_FOR_NAMES = 20  # Of the limits, to the right of all points; a factor on a logarithmic axis.
KERNEL_COLORS = (ORANGE, RED, "#7a5195", "#2f9e6e", "#b8860b", "#00798c", "#d45087", "#665c54")
PEER_COLORS = (GREY, BLUE, "#1d3557", "#4a7c8c", "#8a7f9c", INK, "#6b7280")
LAYOUT_MARKERS = {"2bit": "o", "1.6bit": "D"}
OTHER_LAYOUT_MARKER = "P"
PEER_MARKERS = ("s", "^", "v", "<", "X", "*", "p")


@dataclass(frozen=True)
class _Look:
    color: str
    marker: str


def draw(path: Path, results: Results) -> None:
    """Writes the PNG, a panel for each of the first numbers of threads."""
    panels = sorted({m.case.threads for m in results.measurements})[:MOST_PANELS]
    looks = _looks(results.measurements)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3 + 6 * len(panels), 8.4), dpi=120, facecolor="white")
        grid = figure.add_gridspec(
            1, len(panels), left=0.6 / (3 + 6 * len(panels)) + 0.03, right=0.97, top=0.8, bottom=0.27, wspace=0.14
        )
        shared: Axes | None = None
        for index, threads in enumerate(panels):
            axes = figure.add_subplot(grid[0, index], sharex=shared, sharey=shared)
            shared = shared or axes
            _draw_panel(axes, results, threads, looks)
        shapes = ", ".join(f"{n} x {k}" for n, k in results.options.shapes)
        left = figure.axes[0].get_position().x0
        figure.text(left, 0.94, "BitLab on the roofline of this machine", fontsize=18, fontweight="bold")
        where = "the cache" if results.options.in_cache else "memory"
        caption = f"{results.machine.cpu}; layers {shapes} (out x in); weights from {where}"
        figure.text(left, 0.9, caption, fontsize=10, color="#4a535e")
        _draw_legend(figure, looks)
        figure.savefig(path)


def _name(m: Measurement) -> str:
    return f"{m.contender.name}, {m.contender.layout}" if m.contender.layout else m.contender.name


def _looks(measurements: Sequence[Measurement]) -> dict[str, _Look]:
    """A colour for each kernel or peer, a marker for each layout."""
    kernels = list(dict.fromkeys(m.contender.name for m in measurements if not m.contender.is_peer))
    peers = list(dict.fromkeys(m.contender.name for m in measurements if m.contender.is_peer))
    looks = {}
    for m in measurements:
        if m.contender.is_peer:
            index = peers.index(m.contender.name) % len(PEER_COLORS)
            look = _Look(PEER_COLORS[index], PEER_MARKERS[index])
        else:
            color = KERNEL_COLORS[kernels.index(m.contender.name) % len(KERNEL_COLORS)]
            look = _Look(color, LAYOUT_MARKERS.get(m.contender.layout, OTHER_LAYOUT_MARKER))
        looks[_name(m)] = look
    return looks


def _intensity(m: Measurement) -> float:
    """Operations per byte of weights."""
    return m.case.operations / m.weight_bytes


def _draw_panel(axes: Axes, results: Results, threads: int, looks: dict[str, _Look]) -> None:
    axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", pad=22)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("GOPS")
    axes.grid(which="major", color="#eceff2")
    chosen = [m for m in results.measurements if m.case.threads == threads]
    _draw_limits(axes, results, threads)
    for name, look in looks.items():
        points = [m for m in chosen if _name(m) == name]
        xs, ys = [_intensity(m) for m in points], [m.gops for m in points]
        axes.scatter(xs, ys, s=38, marker=look.marker, color=look.color, alpha=0.85, linewidths=0, zorder=3)
    _label_rows(axes, chosen)


def _draw_limits(axes: Axes, results: Results, threads: int) -> None:
    """The slope of the bandwidth, and a roof for each kind of multiply-add."""
    overall = {
        name: value.median for (name, count), value in overall_limits(results.limits).items() if count == threads
    }
    read = next(name for name in (READ, READ_IN_CACHE) if name in overall)
    bandwidth = max(value for name, value in overall.items() if is_read(name))
    peaks = sorted((value, name) for name, value in overall.items() if unit(name) == "GOPS")
    intensities = [_intensity(m) for m in results.measurements]
    first, last = min(intensities) / 1.6, max(intensities) * ROOM_FOR_NAMES
    ridge = max([value for value, _ in peaks], default=bandwidth * last) / bandwidth
    axes.plot([first, min(ridge, last)], [bandwidth * first, bandwidth * min(ridge, last)], color=INK, linewidth=1.6)
    middle = (first * min(ridge, last)) ** 0.5
    axes.annotate(
        f"{read}\n{bandwidth:.0f} GB/s",
        (middle, bandwidth * middle),
        xytext=(-8, 6),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    previous = None
    for value, name in reversed(peaks):
        start = value / bandwidth
        if start < last:
            axes.plot([max(start, first), last], [value, value], color=INK, linewidth=1.2, linestyle=(0, (5, 2)))
        # Two roofs of one height share a line: their names go above and below it.
        below = previous is not None and previous / value < 1.25
        axes.annotate(
            f"{name} {value:.0f} GOPS",
            (last, value),
            xytext=(0, -4 if below else 4),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=9,
            ha="right",
        )
        previous = value
    axes.set_xlim(first, last)


def _label_rows(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """The numbers of rows along the upper edge, at the intensity of the first kernel."""
    first = next((m.contender for m in measurements if not m.contender.is_peer), measurements[0].contender)
    intensities = {m.case.rows: _intensity(m) for m in measurements if m.contender == first}
    for rows, intensity in sorted(intensities.items()):
        axes.axvline(intensity, color="#eceff2", linewidth=6, zorder=0)
        axes.annotate(
            # Numbers alone, but the last: many stand close together.
            f"{rows}" if rows < max(intensities) else f"{rows} row{'s' if rows > 1 else ''}",
            (intensity, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center" if rows < max(intensities) else "left",
            fontsize=9,
            color="#4a535e",
        )


def _draw_legend(figure: Figure, looks: dict[str, _Look]) -> None:
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="", markersize=7, label=name)
        for name, look in looks.items()
    ]
    columns = 3 if len(figure.axes) == 1 else 4
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=9, handletextpad=0.3)
