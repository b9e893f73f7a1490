"""Whether a converted model computes what transformers computes from its source."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import bitlayers.transformers  # noqa: F401 (makes "bitlab" known to from_pretrained)
from bitcore.exceptions import FileError
from bitmodels.checkpoints.huggingface import CONFIG, read_json

PROMPTS, TOKENS = 3, 32
LARGEST_DISTANCE = 0.5
"""Between logits, relative to their own size. A wrong scale, order of rows or activation gives about 1 and more. Codes
of activations that round to the other side of a tie are amplified from layer to layer: with random weights to 0.13 in
30 layers, where int8 activations stand for float ones to 0.08 in 28."""


def verify(source: Path, directory: Path) -> list[str]:
    """Compares logits of a converted model on fixed prompts with those of its source in transformers, in float32.

    Returns:
        What was found, a line each.

    Raises:
        FileError: they have nothing to do with each other.
    """
    if not source.is_dir():
        return ["not verified: transformers does not load these types of GGUF"]
    named = read_json(source / CONFIG).get("architectures") or [None]
    if not hasattr(transformers, str(named[0])):
        return [f"not verified: transformers has no class {named[0]}"]
    with torch.inference_mode(), _quietly(), torch.compiler.set_stance("force_eager"):  # Their layers compile parts.
        try:
            expected = _of_source(source)
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:  # All that it is known to raise.
            return [f"not verified: transformers cannot run the source: {str(error).splitlines()[0][:200]}"]
        found = _logits(_load(directory))
    distance = float((found - expected).norm() / expected.norm())
    agreeing = int((found.argmax(-1) == expected.argmax(-1)).sum())
    if not distance <= LARGEST_DISTANCE:
        raise FileError(
            f"{source}: the converted model's logits differ from those of transformers by {distance:.2g} of their "
            f"size, expected {LARGEST_DISTANCE} at most: nothing was written"
        )
    return [
        f"verified: logits differ from transformers' by {distance:.2g} of their size, by "
        f"{float((found - expected).abs().max()):.2g} at most (their deviation is {float(expected.std()):.2g}); "
        f"{agreeing} of {PROMPTS * TOKENS} first choices agree"
    ]


def _of_source(source: Path) -> Tensor:
    model = _load(source)
    for tensor in (*model.parameters(), *model.buffers()):  # Some of its own layers keep the checkpoint's dtype.
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return _logits(model)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers without progress bars and advice."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _load(directory: Path) -> Any:
    kind: Any = transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def _prompts(vocabulary: int) -> Tensor:
    """The same for every model of a vocabulary: numbers that are spread over it."""
    index = torch.arange(PROMPTS * TOKENS)
    return ((index * index * 7919 + index * 104729 + 13) % vocabulary).view(PROMPTS, TOKENS)


def _logits(model: Any) -> Tensor:
    """Of the prompts, without each position's mean, on which no choice depends."""
    values: Tensor = model(_prompts(model.config.vocab_size)).logits.float()
    return values - values.mean(-1, keepdim=True)
