"""The engine against transformers, which computes the same directories in float32 with BitLab's layers."""

from __future__ import annotations

import argparse
import inspect
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import bitlayers.transformers  # makes "bitlab" known to from_pretrained
from bitmodels import LanguageModel
from bitmodels.checkpoints import convert_checkpoint
from bitmodels.native_model import Append
from checkpoints import as_floats, hugging_face
from language_models import IDS, MODELS, all_logits

pytestmark = pytest.mark.medium  # Importing transformers takes seconds.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

STEPS = 64


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LanguageModel, Any]:
    """A model in the engine and in transformers."""
    make, options = MODELS[request.param]
    source = make()
    source.config["max_position_embeddings"] = 128
    convert_checkpoint(hugging_face(tmp_path / "source", source, as_floats(source)), tmp_path / "model", **options)
    kind: Any = AutoModelForCausalLM
    theirs = kind.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager").eval()
    return LanguageModel.open(tmp_path / "model"), theirs


def logits_of(theirs: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        return theirs(torch.tensor([ids])).logits[0].numpy()


def test_logits(both: tuple[LanguageModel, Any]) -> None:
    """Float32 rounds 2^-24 of a value, in sums of up to 264 products some 1e-6: so far apart are logits where no code
    of an activation lies next to a tie. Where one does, a whole step of it, 1 / 127 of the largest activation, goes
    through the layers after it."""
    ours, theirs = both
    found, expected = all_logits(ours, "float32"), logits_of(theirs, IDS)
    distances = np.abs(found - expected).max(axis=1) / expected.std()
    assert np.median(distances) < 2e-5
    assert distances.max() < 0.05
    assert (distances > 1e-4).mean() < 0.25


def test_greedy_tokens(both: tuple[LanguageModel, Any]) -> None:
    """Equal over 64 steps, except where the two largest logits are nearly the same; then ours goes on with theirs."""
    ours, theirs = both
    session, ids, near_ties = ours.session(cache="float32"), IDS[:8], 0
    (logits,) = ours.forward([Append(session, ids)]) or []
    for _ in range(STEPS):
        expected = logits_of(theirs, ids)[-1]
        token = int(expected.argmax())
        if int(logits[0].argmax()) != token:
            near_ties += 1
            gap = float(expected.max() - expected[int(logits[0].argmax())])
            assert gap < 0.05 * expected.std()
        ids = [*ids, token]
        (logits,) = ours.forward([Append(session, [token])]) or []
    assert near_ties <= 2


def test_perplexity(both: tuple[LanguageModel, Any]) -> None:
    ours, theirs = both
    with torch.inference_mode():
        ids = torch.tensor([IDS])
        expected = float(theirs(ids, labels=ids).loss)
    assert np.log(ours.perplexity(IDS, cache="float32")) == pytest.approx(expected, rel=1e-3)


def source_text() -> bytes:
    """Of Python's own library."""
    return b"".join(Path(str(module.__file__)).read_bytes() for module in (argparse, inspect, tarfile, typing))


def test_a_trained_model_on_real_text(tmp_path: Path) -> None:
    """Bytes are tokens; perplexity of held-out text is equal to four digits."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(source_text()), dtype=torch.uint8).long()
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=256)
    model: Any = bitlayers.convert(AutoModelForCausalLM.from_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held_out, training = text[:2048], text[4096:]
    for _ in range(60):
        begins = torch.randint(len(training) - 96, (12,))
        batch = torch.stack([training[begin : begin + 96] for begin in begins])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    bitlayers.deploy(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        losses = [float(model(part[None], labels=part[None]).loss) for part in held_out.split(256)]
    expected = float(np.exp(np.mean(losses)))
    ours = LanguageModel.open(tmp_path)
    assert expected < 30  # It has learned something: at first it is 256.
    caches: tuple[tuple[Any, float], ...] = (("float32", 1e-4), ("float16", 3e-4), ("int8", 5e-3))
    for cache, digits in caches:
        assert ours.perplexity(held_out.tolist(), window=256, cache=cache) == pytest.approx(expected, rel=digits)
