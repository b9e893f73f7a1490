"""Damaged, foreign and missing model files: loading raises what says which file and why, before anything is built."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitcore.exceptions import FileError, QuantizationError
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel
from support import same_bits

WEIGHTS, CONFIG = "model.safetensors", "config.json"
X = torch.linspace(-2, 2, 3 * 20).reshape(3, 20)
Damage = Callable[[Path], object]


def make_model() -> BitMLPModel:
    torch.manual_seed(97)
    return BitMLPModel(BitMLPConfig(3, 20, 33, 5, 0.0)).deploy()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a deployed model."""
    make_model().save_pretrained(tmp_path)
    return tmp_path


def test_undamaged_model_comes_back(saved: Path) -> None:
    """What all the cases below begin with."""
    assert same_bits(AutoBitModel.from_pretrained(saved)(X), make_model()(X))


# --- the table ------------------------------------------------------------------------------------------------------


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def header_without_end(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def tensors(change: Callable[[dict[str, Tensor]], object], *, metadata: bool = True) -> Damage:
    def rewrite(folder: Path) -> None:
        path = folder / WEIGHTS
        with safe_open(path, "pt") as file:
            kept = file.metadata() if metadata else None
        found = load_file(path)
        change(found)
        save_file(found, path, kept)

    return rewrite


def put(name: str, tensor: Tensor) -> Damage:
    return tensors(lambda found: found.update({name: tensor}), metadata=False)


def config(**changes: object) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def text(old: str, new: str) -> Damage:
    def replace(folder: Path) -> None:
        found = (folder / CONFIG).read_text()
        assert old in found
        (folder / CONFIG).write_text(found.replace(old, new))

    return replace


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, file)
    return file.getvalue()


PER_ROW = {"weight_granularity": "per_channel", "activation_dtype": "int8", "activation_granularity": "per_channel"}
FLOAT32 = {"activation_dtype": "float32", "activation_granularity": "per_channel"}
OTHER_FILES = [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), bytes(64), b"\xff" * 64, pickled()]
OTHER_CONFIGS = [b"", b"{", b"[]", b"null", b'"BitMLPModel"', b"{}", b"\x00", b"\xff\xfe\x00", b"[" * 100_000]
DAMAGES: list[tuple[Damage, str]] = [
    *((content(WEIGHTS, data), "model.safetensors.*safetensors") for data in OTHER_FILES),
    (header_without_end, "model.safetensors.*safetensors"),
    (tensors(lambda found: found["layers.1.qweight"].view(-1)[5].bitwise_xor_(4)), r"safetensors: layers\.1\.qweight"),
    (tensors(lambda found: found.pop("layers.1.bias"), metadata=False), r"model.safetensors.*layers\.1\.bias"),
    (tensors(lambda found: found["layers.1.bias"][3:].fill_(torch.nan)), r"safetensors: layers\.1\.bias holds NaN"),
    (put("layers.3.bias", torch.zeros(5)), r"model.safetensors.*layers\.3\.bias"),
    (put("layers.2.bias", torch.zeros(6)), r"model.safetensors.*layers\.2\.bias"),
    (put("layers.1.bias", torch.zeros(33).double()), r"safetensors: layers\.1\.bias has dtype torch.float64"),
    *((content(CONFIG, data), "config.json") for data in OTHER_CONFIGS),
    (text('"dropout": 0.0', '"dropout": ' + "[" * 900 + "]" * 900), "config.json"),
    (text('"dropout": 0.0', '"dropout": NaN'), "NaN is no number"),
    (text('"hidden_dim": 33', '"hidden_dim": 33.5'), "hidden_dim is 33.5"),
    (text('"hidden_dim": 33', '"hidden_dim": 33, "hidden_dim": 34'), "hidden_dim.*twice"),
    (config(model_type="Other"), 'config.json.*"Other".*bit_mlp'),
    (config(model_type=None), "model_type"),
    (config(hidden_dim=34), "saved with hidden_dim=33, config.json says hidden_dim=34"),
    (config(hidden_dim=2**40), f"hidden_dim=33, config.json says hidden_dim={2**40}"),
    (config(hidden_dim="33"), "hidden_dim"),
    (config(hidden_dim=-1), "config.json.*hidden_dim is -1"),
    (config(in_channels=22), "in_channels"),
    (config(out_channels=4), "out_channels"),
    (config(n_layers=2), "n_layers=3.*n_layers=2"),
    (config(bias=False), "bias=true.*bias=false"),
    (config(dropout=2), "dropout"),
    (config(dropout=None), "config.json: dropout is None"),
    (config(depth=3), "config.json.*depth"),
    (config(quant_config=None), "quant_config"),
    (config(quant_config=PER_ROW), "per_tensor.*per_channel"),
    (config(quant_config=FLOAT32), "quant_config"),
    (config(quant_config={"activation_dtype": "int4"}), "int4"),
    (config(module_configs=[]), "module_configs is"),
    (config(module_configs={"layers.7": {}}), r"layers\.7.*no ternary layers"),
    (config(module_configs={"layers.1": {"bits": "2"}}), "layers.1 has .*bits"),
    (config(tied_tensors={"a": 1}), "tied_tensors is"),
    (config(tied_tensors={"a": "b"}), r"'b'.*does not hold"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_files(damage: Damage, message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(FileError, match=f"(?s){message}") as caught:
        AutoBitModel.from_pretrained(saved)
    assert str(saved) in str(caught.value)


# --- any byte -------------------------------------------------------------------------------------------------------


def payload_ranges(content: bytes) -> list[tuple[int, int]]:
    """Where the packed weights lie in the file: the header is a little-endian length and as many bytes of JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    offsets = [entry["data_offsets"] for name, entry in header.items() if name.endswith(".qweight")]
    assert len(offsets) == 3
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


# --- configs that fit no file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"hidden_dim": 34}, {"n_layers": 2}, {"bias": False}, {"quant_config": PER_ROW}])
def test_another_config_shows_without_metadata(change: dict[str, object], tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    AutoBitModel.from_pretrained(tmp_path)
    config(**change)(tmp_path)
    with pytest.raises(QuantizationError, match=r"model\.safetensors: "):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("hidden_dim", [10**9, 2**40, 2**63])
def test_a_config_beyond_all_memory(hidden_dim: int, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    config(hidden_dim=hidden_dim)(tmp_path)
    with pytest.raises(QuantizationError, match=r"(model\.safetensors|config\.json): "):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("n_layers", [4, 10**6, 10**30])
@pytest.mark.parametrize("with_metadata", [False, True])
def test_a_config_of_more_layers_is_refused_before_it_is_built(
    n_layers: int, with_metadata: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path), path, {"n_layers": str(n_layers)} if with_metadata else None)
    config(n_layers=n_layers)(tmp_path)

    def build(*_: object) -> None:
        raise AssertionError("the model is built")

    monkeypatch.setattr(BitMLPModel, "__init__", build)
    with pytest.raises(QuantizationError, match=rf"model\.safetensors: holds 3 layers, .* n_layers={n_layers}$"):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        AutoBitModel.from_pretrained(tmp_path)
