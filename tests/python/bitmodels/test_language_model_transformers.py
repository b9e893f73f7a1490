"""The engine against transformers, which computes the same directories in float32 with BitLab's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import bitlayers.transformers  # noqa: F401 (makes "bitlab" known to from_pretrained)
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
