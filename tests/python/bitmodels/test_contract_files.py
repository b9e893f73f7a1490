"""Damaged model files: loading raises QuantizationError or gives what the file says, and never anything else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel
from support import same_bits

WEIGHTS = "model.safetensors"
X = torch.linspace(-2, 2, 3 * 21).reshape(3, 21)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a deployed model."""
    torch.manual_seed(97)
    model = BitMLPModel(BitMLPConfig(2, 21, 18, 5, 0.0), BitQuantConfig(activation_granularity="per_channel"))
    model.deploy().save_pretrained(tmp_path)
    return tmp_path


def payload_ranges(content: bytes) -> list[tuple[int, int]]:
    """Where the packed weights lie in the file: the header is a little-endian length and as many bytes of JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    offsets = [entry["data_offsets"] for name, entry in header.items() if name.endswith(".qweight")]
    assert len(offsets) == 2
    return [(8 + length + begin, 8 + length + end) for begin, end in offsets]


def test_truncated_anywhere(saved: Path) -> None:
    path = saved / WEIGHTS
    content = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, *range(10, len(content), len(content) // 40)}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(QuantizationError, match=r"model\.safetensors"):
            AutoBitModel.from_pretrained(saved)
    path.write_bytes(content + b"\0")
    with pytest.raises(QuantizationError, match=r"model\.safetensors"):
        AutoBitModel.from_pretrained(saved)
    path.write_bytes(content)
    AutoBitModel.from_pretrained(saved)


@pytest.mark.medium
def test_each_flip_in_packed_weights_is_refused(saved: Path) -> None:
    path = saved / WEIGHTS
    content = path.read_bytes()
    rng = np.random.default_rng(98)
    for begin, end in payload_ranges(content):
        for offset in [*range(end - 40, end), *rng.integers(begin, end, 60).tolist()]:
            damaged = bytearray(content)
            damaged[offset] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(QuantizationError, match=r"layers\.\d\.qweight"):
                AutoBitModel.from_pretrained(saved)


def test_any_flip_is_refused_or_harmless(saved: Path) -> None:
    """In the header, scales and biases a flip may go unseen, but it raises nothing else and the model runs."""
    path = saved / WEIGHTS
    content = path.read_bytes()
    rng = np.random.default_rng(99)
    loaded = 0
    for _ in range(250):
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            model = AutoBitModel.from_pretrained(saved)
        except QuantizationError:
            continue
        loaded += 1
        assert model(X).shape == (3, 5)
    assert 0 < loaded < 200


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), bytes(64), b"\xff" * 64])
def test_other_kinds_of_files(saved: Path, content: bytes) -> None:
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(QuantizationError, match=r"model\.safetensors"):
        AutoBitModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_dim", 19),
        ("in_channels", 22),
        ("out_channels", 4),
        ("n_layers", 1),
        ("n_layers", 3),
        ("bias", False),
        ("hidden_dim", "18"),
        ("hidden_dim", -18),
        ("dropout", 2),
        ("quant_config", None),
        ("quant_config", {"weight_granularity": "per_channel"}),
        ("quant_config", {"activation_dtype": "float32", "activation_granularity": "per_channel"}),
        ("quant_config", {"activation_dtype": "int4"}),
        ("model_type", "OtherModel"),
        ("model_type", None),
        ("colour", "blue"),
    ],
)
def test_config_of_another_model(saved: Path, name: str, value: object) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, name: value}))
    with pytest.raises(QuantizationError, match="int4" if "int4" in str(value) else name):
        AutoBitModel.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"BitMLPModel"', "{}", "\x00"])
def test_config_that_is_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(QuantizationError, match=r"config\.json"):
        AutoBitModel.from_pretrained(saved)


def test_undamaged_model_comes_back(saved: Path) -> None:
    """What all the cases above began with."""
    torch.manual_seed(97)
    model = BitMLPModel(BitMLPConfig(2, 21, 18, 5, 0.0), BitQuantConfig(activation_granularity="per_channel"))
    assert same_bits(AutoBitModel.from_pretrained(saved)(X), model.eval()(X))
