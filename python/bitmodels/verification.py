"""Whether a converted model computes what transformers computes from its source."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bitcore.exceptions import FileError
from bitlayers import Int8Linear
from bitmodels.checkpoints.huggingface import CONFIG, read_json

PROMPTS, TOKENS = 3, 32
LARGEST_DISTANCE = 0.2
"""Between logits, relative to their own size. A wrong scale, order of rows or activation gives more than 1; int8
activations where the source has float ones, a few hundredths."""


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
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # Their layers compile parts of themselves.
        expected, head = _of_source(source)
        found, head_difference = _of_target(directory, head)
    distance = float((found - expected).norm() / expected.norm())
    agreeing = int((found.argmax(-1) == expected.argmax(-1)).sum())
    if not distance <= LARGEST_DISTANCE:
        raise FileError(
            f"{source}: the converted model's logits differ from those of transformers by {distance:.2g} of their "
            f"size, expected {LARGEST_DISTANCE} at most: nothing was written"
        )
    lines = [
        f"verified: logits differ from transformers' by {distance:.2g} of their size, by "
        f"{_largest(found, expected):.2g} at most (their deviation is {float(expected.std()):.2g}); "
        f"{agreeing} of {PROMPTS * TOKENS} first choices agree"
    ]
    if head_difference is not None:
        lines.append(f"verified: the int8 head alone changes a logit by {head_difference:.2g} at most")
    return lines


def _of_source(source: Path) -> tuple[Tensor, Tensor]:
    """Logits, and the head's weight."""
    model = _load(source)
    logits = _logits(model, _prompts(model.config.vocab_size))
    head: Tensor = model.get_output_embeddings().weight
    return logits, head.float()


def _of_target(directory: Path, head: Tensor) -> tuple[Tensor, float | None]:
    """Logits, and by how much the int8 head changes one; None where it is no int8 head."""
    model = _load(directory)
    prompts = _prompts(model.config.vocab_size)
    logits = _logits(model, prompts)
    if not isinstance(model.get_output_embeddings(), Int8Linear):
        return logits, None
    hidden = model.base_model(prompts).last_hidden_state
    return logits, _largest(model.get_output_embeddings()(hidden), hidden @ head.T)


def _load(directory: Path) -> Any:
    kind: Any = transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def _prompts(vocabulary: int) -> Tensor:
    """The same for every model of a vocabulary: numbers that are spread over it."""
    index = torch.arange(PROMPTS * TOKENS)
    return ((index * index * 7919 + index * 104729 + 13) % vocabulary).view(PROMPTS, TOKENS)


def _logits(model: Any, prompts: Tensor) -> Tensor:
    """Without each position's mean, on which no choice depends."""
    values: Tensor = model(prompts).logits.float()
    return values - values.mean(-1, keepdim=True)


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
