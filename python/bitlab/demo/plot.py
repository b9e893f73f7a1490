"""The demo's picture: training curves, classified digits, speed bars."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bitlab.demo import timing
from bitlab.demo.data import Images
from bitlab.demo.timing import Timing
from bitlab.demo.training import History
from bitlab.style import BLUE, GREY, INK, ORANGE, RED, STYLE
from bitlab.times import format_us

matplotlib.use("Agg")

BAR_COLORS = {timing.FLOAT32: GREY, timing.BFLOAT16: BLUE, timing.TERNARY: ORANGE}
DIGIT_COLUMNS, DIGIT_ROWS = 12, 2
LOWEST_SHOWN = 88  # Percent; the first epochs lie below.


def draw(
    path: Path,
    histories: dict[str, History],
    accuracies: dict[str, float],
    images: Images,
    outputs: Tensor | None,
    timings: list[Timing],
) -> None:
    """Writes the PNG.

    Args:
        path: Where.
        histories: Training curves of the first seed, by model.
        accuracies: Mean test accuracy in percent, by model.
        images: The test images.
        outputs: The C++ program's logits for them, (n, 10); None: the digits are left out.
        timings: Of the speed bars; empty: they are left out.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8), dpi=130, facecolor="white")
        grid = figure.add_gridspec(
            2,
            3,
            height_ratios=(1.9, 1),
            width_ratios=(1, 1, 1.25),
            left=0.05,
            right=0.985,
            top=0.83,
            bottom=0.03,
            hspace=0.6,
            wspace=0.3,
        )
        _title(figure, accuracies)
        _draw_loss(figure.add_subplot(grid[0, 0]), histories)
        _draw_accuracy(figure.add_subplot(grid[0, 1]), histories)
        _draw_speed(figure.add_subplot(grid[0, 2]), timings)
        if outputs is not None:
            _draw_digits(figure, grid[1, :], images, outputs)
        figure.savefig(path)


def _title(figure: Figure, accuracies: dict[str, float]) -> None:
    parts = ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
    figure.text(0.05, 0.945, "A ternary network reads handwritten digits", fontsize=19, fontweight="bold")
    summary = f"Mean test accuracy over the seeds: {parts}. Curves and digits: first seed."
    figure.text(0.05, 0.907, summary, fontsize=12, color="#4a535e")


def _draw_loss(axes: Axes, histories: dict[str, History]) -> None:
    axes.set_title("Training loss (smoothed labels)")
    for (name, history), color in zip(histories.items(), (GREY, ORANGE), strict=True):
        axes.plot(range(1, len(history.loss) + 1), history.loss, color=color, linewidth=2.2, label=name)
    axes.set_xlabel("epoch")
    axes.grid(axis="y", color="#eceff2")
    axes.legend(loc="upper right")


def _draw_accuracy(axes: Axes, histories: dict[str, History]) -> None:
    axes.set_title("Validation accuracy, %")
    for (name, history), color in zip(histories.items(), (GREY, ORANGE), strict=True):
        values = history.validation_accuracy
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=2.2, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylim(LOWEST_SHOWN, 100)
    axes.grid(axis="y", color="#eceff2")
    axes.legend(loc="lower right")


def _draw_speed(axes: Axes, timings: list[Timing]) -> None:
    axes.set_title("Speed of a layer, nn.Linear float32 = 1")
    if not timings:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.set_axis_off()
        return
    cases = [(shape, rows) for rows in timing.ROWS for shape in timing.SHAPES]
    for position, (shape, rows) in enumerate(cases):
        _draw_case(axes, position, timing.find(timings, shape, rows))
    labels = [f"{shape[0]} x {shape[1]}\n{rows} row{'s' if rows > 1 else ''}" for shape, rows in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.32)
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in BAR_COLORS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, 0.01), ncols=3, fontsize=9, handlelength=1)


def _draw_case(axes: Axes, position: int, case: dict[str, Timing]) -> None:
    height = 0.26
    for index, name in enumerate(timing.CONTENDERS):
        speed = case[timing.FLOAT32].median_us / case[name].median_us
        place = position + (index - 1) * height
        axes.barh(place, speed, height * 0.88, color=BAR_COLORS[name])
        text = f" {speed:.1f} x, " if name != timing.FLOAT32 else " "
        weight = "bold" if name == timing.TERNARY else "normal"
        axes.text(speed, place, text + format_us(case[name].median_us), va="center", fontsize=9, fontweight=weight)


def _draw_digits(figure: Figure, place: object, images: Images, outputs: Tensor) -> None:
    grid = place.subgridspec(DIGIT_ROWS, DIGIT_COLUMNS, hspace=0.45, wspace=0.1)  # type: ignore[attr-defined]
    predictions = outputs.argmax(dim=1)
    wrong = int((predictions != images.y).sum())
    for cell, index in enumerate(_shown(predictions, images)):
        axes = figure.add_subplot(grid[cell // DIGIT_COLUMNS, cell % DIGIT_COLUMNS])
        axes.imshow(images.x[index].view(8, 8).numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set_axis_off()
        predicted, label = int(predictions[index]), int(images.y[index])
        text = str(predicted) if predicted == label else f"{predicted} (is {label})"
        color = INK if predicted == label else RED
        axes.set_title(text, loc="center", fontsize=12, pad=3, color=color)
    right = len(images) - wrong
    caption = f"Test images as the C++ program reads them: {right} of {len(images)} right, mistakes in red"
    figure.text(0.05, 0.318, caption, fontsize=13, fontweight="bold")


def _shown(predictions: Tensor, images: Images) -> list[int]:
    """The first images, and the mistakes (a few of them) at the end."""
    count = DIGIT_ROWS * DIGIT_COLUMNS
    mistakes = (predictions != images.y).nonzero().flatten().tolist()[: DIGIT_COLUMNS // 3]
    right = (predictions == images.y).nonzero().flatten().tolist()[: count - len(mistakes)]
    return right + mistakes
