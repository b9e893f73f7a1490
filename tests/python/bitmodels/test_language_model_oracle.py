"""The engine's logits against the contract in NumPy, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attention_oracle
import language_model_oracle
from bitmodels import LanguageModel
from bitmodels.checkpoints import convert_checkpoint
from bitmodels.native_model import Append
from checkpoints import TinyModel, as_floats, hugging_face, tiny
from language_models import CACHES, IDS, LONGROPE, MODELS

TOKENS = 24


def converted(folder: Path, model: TinyModel, **options: Any) -> Path:
    """A directory in BitLab's form."""
    convert_checkpoint(hugging_face(folder / "source", model, as_floats(model)), folder / "model", **options)
    return folder / "model"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: converted(tmp_path_factory.mktemp(f"m{index}"), make(), **options)
        for index, (name, (make, options)) in enumerate(MODELS.items())
    }


def engine_logits(directory: Path, tokens: list[int], cache: Any, context_limit: int = 0) -> Any:
    model = LanguageModel.open(directory, threads=1)
    (logits,) = model.forward([Append(model.session(context_limit, cache), tokens, "all")]) or []
    return logits


def assert_same_bits(found: Any, expected: Any) -> None:
    """NaN counts as NaN."""
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert found.shape == expected.shape
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ, first at {np.argwhere(~same)[0]}"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_cache(name: str, cache: str, directories: dict[str, Path]) -> None:
    expected = language_model_oracle.logits(directories[name], IDS[:TOKENS], cache)
    assert np.isfinite(expected).all()
    assert_same_bits(engine_logits(directories[name], IDS[:TOKENS], cache), expected)


@pytest.mark.medium
@pytest.mark.parametrize("cache", CACHES)
def test_over_a_block_boundary(cache: str, tmp_path: Path) -> None:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny("qwen3", 32, max_position_embeddings=512, **sizes)
    directory, tokens = converted(tmp_path, model), [(i * i + 3) % 96 for i in range(300)]
    assert_same_bits(engine_logits(directory, tokens, cache), language_model_oracle.logits(directory, tokens, cache))


@pytest.mark.parametrize("context_limit", [32, 33])
def test_both_lists_of_longrope(context_limit: int, tmp_path: Path) -> None:
    """The original length is 32."""
    directory = converted(tmp_path, tiny("minicpm", 64, rope_scaling=LONGROPE))
    expected = language_model_oracle.logits(directory, IDS[:TOKENS], "float32", context_limit)
    assert_same_bits(engine_logits(directory, IDS[:TOKENS], "float32", context_limit), expected)


@pytest.mark.parametrize("scaling", [{"beta_fast": 8.0, "truncate": False}, {"mscale": 0.7, "mscale_all_dim": 0.9}])
def test_what_yarn_can_be_told(scaling: dict[str, Any], tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **scaling}
    directory = converted(tmp_path, tiny("llama", 64, rope_scaling=yarn))
    expected = language_model_oracle.logits(directory, IDS[:TOKENS], "float32")
    assert_same_bits(engine_logits(directory, IDS[:TOKENS], "float32"), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_values_that_float16_cannot_hold(cache: str, tmp_path: Path) -> None:
    """Their rows and those that see them are NaN, others do not notice."""
    model = tiny("llama", 64)
    scales = model.scales["model.layers.0.self_attn.v_proj"]
    scales *= np.float16(60_000)
    directory = converted(tmp_path, model)
    expected = language_model_oracle.logits(directory, IDS[:TOKENS], cache)
    rows = np.isnan(expected).all(axis=1)
    assert (np.isnan(expected).any(axis=1) == rows).all()
    assert (0 < rows.sum() < TOKENS) == (cache == "float16")
    assert_same_bits(engine_logits(directory, IDS[:TOKENS], cache), expected)


@pytest.mark.parametrize("form", CACHES)
def test_attention_of_all_queries_is_that_of_each(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of models against that of attention, with blocks of 16 positions."""
    monkeypatch.setattr(attention_oracle, "BLOCK", 16)
    rng = np.random.default_rng(1)
    q = rng.normal(0, 1, (35, 4, 8)).astype(np.float32)
    k, v = rng.normal(0, 1, (2, 35, 2, 8)).astype(np.float32)
    k[20, 0, 3], v[30, 1, 5] = np.nan, np.inf
    expected = attention_oracle.causal_attention(q, k, v, form)
    found = language_model_oracle.causal_attention(q, k, v, form, attention_oracle.score_scale(8))
    assert np.isnan(expected).any()
    assert np.isfinite(expected[:20]).all()
    assert_same_bits(found, expected)
