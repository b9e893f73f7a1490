"""The arguments of `bitlab bench`. Light: every start of the command imports it."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LAYOUTS = ("2bit", "1.6bit")
ACTIVATIONS = ("int8", "float32")
WEIGHTS = ("per_tensor", "per_channel", "per_group", "per_group_x")
PEER_GROUPS = ("torch", "onednn", "transformers", "ggml")
BEST, ALL, NONE = "best", "all", "none"

T = TypeVar("T")


class UsageError(Exception):
    """Arguments that the parser alone cannot tell are wrong."""


@dataclass(frozen=True)
class BenchOptions:
    """What the command line sets. Shapes are (out_features, in_features)."""

    shapes: tuple[tuple[int, int], ...] = ((2560, 2560), (6912, 2560))
    rows: tuple[int, ...] = (1, 4, 32, 512)
    threads: tuple[int, ...] = (1,)
    kernels: tuple[str, ...] = (ALL,)
    layouts: tuple[str, ...] = LAYOUTS
    activations: tuple[str, ...] = ("int8",)
    weights: tuple[str, ...] = ("per_tensor",)
    peers: tuple[str, ...] = ("torch",)
    imports: tuple[str, ...] = ()
    in_cache: bool = False
    training: bool = False
    overhead: bool = False
    repetitions: int | None = None
    seconds: float = 60.0
    output: Path = Path("bench-output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options, with their defaults."""
    every_core = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument(
        "--shapes", type=_list_of(_shape), default="2560x2560,6912x2560", help="out x in of the layers (%(default)s)"
    )
    parser.add_argument("--rows", type=_list_of(_count), default="1,4,32,512", help="rows of x (%(default)s)")
    parser.add_argument(
        "--threads", type=_list_of(_count), default=",".join(map(str, every_core)), help="threads (%(default)s)"
    )
    parser.add_argument(
        "--kernels",
        type=_list_of(str),
        default=ALL,
        help="best: the dispatched one; all: every kernel that fits, registered ones too, but not ReferenceKernel and "
        "TorchKernel; or names (%(default)s)",
    )
    parser.add_argument(
        "--layouts", type=_list_of(_one_of(LAYOUTS)), default=",".join(LAYOUTS), help="packed layouts (%(default)s)"
    )
    parser.add_argument(
        "--activations", type=_list_of(_one_of(ACTIVATIONS)), default="int8", help="int8, float32 (%(default)s)"
    )
    parser.add_argument(
        "--weights",
        type=_list_of(_one_of(WEIGHTS)),
        default="per_tensor",
        help="how many scales weights have: per_tensor, per_channel, per_group (of 128), per_group_x (x per group, "
        "too) (%(default)s)",
    )
    parser.add_argument(
        "--peers",
        type=_list_of(_one_of((*PEER_GROUPS, ALL, NONE))),
        default="torch",
        help=f"{', '.join(PEER_GROUPS)}; all; none (%(default)s)",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module that registers kernels, before anything else; may be given several times",
    )
    parser.add_argument(
        "--in-cache", action="store_true", help="use one copy of the weights instead of reading them from memory"
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="time forward and backward of the layer next to nn.Linear, a plain straight-through layer and "
        "transformers' AutoBitLinear, instead of the kernels",
    )
    parser.add_argument(
        "--overhead",
        action="store_true",
        help="time calls of an 8 x 8 layer next to nn.Linear's, instead of the kernels",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=_seconds, default=60.0, help="time to measure for, about (%(default)s)")
    amount.add_argument("--repetitions", type=_count, help="turns of every subject in every case, instead of --seconds")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="where results go (%(default)s)")


def to_options(arguments: argparse.Namespace) -> BenchOptions:
    """The options of parsed arguments."""
    return BenchOptions(
        shapes=arguments.shapes,
        rows=arguments.rows,
        threads=arguments.threads,
        kernels=arguments.kernels,
        layouts=arguments.layouts,
        activations=arguments.activations,
        weights=arguments.weights,
        peers=arguments.peers,
        imports=tuple(arguments.imports),
        in_cache=arguments.in_cache,
        training=arguments.training,
        overhead=arguments.overhead,
        repetitions=arguments.repetitions,
        seconds=arguments.seconds,
        output=arguments.output,
    )


class _ListOf:
    """Parses items separated by commas, each of which counts once."""

    def __init__(self, item: object) -> None:
        self._item = item

    def __call__(self, text: str) -> tuple[object, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"'{text}' has an empty item")
        return tuple(dict.fromkeys(self._item(part) for part in parts))  # type: ignore[operator]


def _list_of(item: object) -> _ListOf:
    return _ListOf(item)


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"'{text}' is no shape, expected OUTxIN, for example 2560x2560")
    return _count(sizes[0]), _count(sizes[1])


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


class _OneOf:
    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def __call__(self, text: str) -> str:
        if text not in self._choices:
            raise argparse.ArgumentTypeError(f"'{text}' is unknown, expected {', '.join(self._choices)}")
        return text


def _one_of(choices: tuple[str, ...]) -> _OneOf:
    return _OneOf(choices)
