"""Medians with their spread, and how times are written."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, and the range that holds the middle 80 percent."""

    median: float
    low: float
    high: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    # "inclusive" stays within what was measured, however few samples there are.
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def format_us(microseconds: float) -> str:
    """52 us, or 7.3 ms."""
    unit, scale, digits = _unit(microseconds)
    return f"{microseconds / scale:.{digits}f} {unit}"


def format_spread(median: float, low: float, high: float) -> str:
    """52 us (50 - 60), of microseconds."""
    unit, scale, digits = _unit(median)
    low_text, median_text, high_text = (f"{us / scale:.{digits}f}" for us in (low, median, high))
    return f"{median_text} {unit} ({low_text} - {high_text})"


def _unit(microseconds: float) -> tuple[str, int, int]:
    """Unit, its microseconds, and the digits after the point."""
    return ("us", 1, 0) if microseconds < 1000 else ("ms", 1000, 1)
