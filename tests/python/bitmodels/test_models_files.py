"""save_pretrained and from_pretrained: what is saved comes back, and nothing damaged does."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitcore.config import BitQuantConfig, all_configs
from bitcore.exceptions import QuantizationError, StateError
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel
from support import same_bits

SIZES = (3, 20, 33, 5)


def make_model(config: BitQuantConfig | None = None, bias: bool = True) -> BitMLPModel:
    torch.manual_seed(0)
    return BitMLPModel(BitMLPConfig(*SIZES, bias=bias), config).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", all_configs(), ids=str)
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(
    config: BitQuantConfig, deployed: bool, dtype: torch.dtype, tmp_path: Path, x: Tensor
) -> None:
    model, x = make_model(config, bias=deployed).to(dtype), x.to(dtype)
    expected = model(x)
    if deployed:
        assert model.deploy() is model
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = AutoBitModel.from_pretrained(tmp_path / "new" / "folder")
    assert isinstance(loaded, BitMLPModel)
    assert loaded.config == model.config
    assert loaded.is_deployed == deployed
    assert not loaded.training
    assert same_bits(loaded(x), expected)
    state, original = loaded.state_dict(), model.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) and state[name].dtype == original[name].dtype for name in state)


def test_a_loaded_model_can_be_trained(tmp_path: Path, x: Tensor) -> None:
    make_model().save_pretrained(tmp_path)
    model = BitMLPModel.from_pretrained(tmp_path).train()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_files_are_plain(tmp_path: Path) -> None:
    make_model().deploy().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "bit_mlp"
    assert config["quant_config"]["activation_granularity"] == "per_channel"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(
            f"layers.{i}.{name}" for i in range(3) for name in ("qweight", "qweight_scale", "bias")
        )
        assert file.metadata()["n_layers"] == "3"
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    (tmp_path / "other").touch()
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_saving_replaces_whole_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("bitmodels.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(bias=False).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_deploy_and_train_of_a_model() -> None:
    model = make_model().deploy()
    assert model.is_deployed
    with pytest.raises(StateError, match="deployed already"):
        model.deploy()
    assert model.train().training
    assert model.is_deployed


# --- damage ---------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_safetensors(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")


def header_without_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def flipped_weight_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.1.qweight"].view(-1)[5] ^= 4
    save_file(tensors, path, metadata)


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.bias"]
    save_file(tensors, folder / "model.safetensors")


def extra_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layers.3.bias": torch.zeros(5)}, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layers.2.bias": torch.zeros(6)}, folder / "model.safetensors")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def nested_field(folder: Path) -> None:
    edit_config(dropout="DEEP")(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"DEEP"', "[" * 900 + "]" * 900))


def nan_bias(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.bias"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def double_bias(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layers.1.bias": tensors["layers.1.bias"].double()}, folder / "model.safetensors")


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


PER_ROW = {"weight_granularity": "per_channel", "activation_dtype": "int8", "activation_granularity": "per_channel"}
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncated, "model.safetensors.*safetensors"),
    (empty, "model.safetensors.*safetensors"),
    (no_safetensors, "model.safetensors.*safetensors"),
    (header_without_end, "model.safetensors.*safetensors"),
    (flipped_weight_bit, r"model.safetensors: layers\.1\.qweight"),
    (missing_tensor, r"model.safetensors.*layers\.1\.bias"),
    (extra_tensor, r"model.safetensors.*layers\.3\.bias"),
    (wrong_shape, r"model.safetensors.*layers\.2\.bias"),
    (not_json, "config.json.*JSON"),
    (not_text, "config.json.*JSON"),
    (no_object, "config.json.*object"),
    (edit_config(model_type="Other"), 'config.json.*"Other".*bit_mlp'),
    (edit_config(hidden_dim=34), "saved with hidden_dim=33, config.json says hidden_dim=34"),
    (edit_config(n_layers=2), "n_layers=3.*n_layers=2"),
    (edit_config(bias=False), "bias=true.*bias=false"),
    (edit_config(quant_config=PER_ROW), "per_tensor.*per_channel"),
    (nested, "config.json.*JSON"),
    (nested_field, "config.json"),
    (nan_bias, r"model.safetensors: layers\.1\.bias holds NaN"),
    (double_bias, r"model.safetensors: layers\.1\.bias has dtype torch.float64"),
    (edit_config(dropout=None), "config.json: dropout is None"),
    (edit_config(hidden_dim=2**40), f"hidden_dim=33, config.json says hidden_dim={2**40}"),
    (edit_config(depth=3), "config.json.*depth"),
    (edit_config(hidden_dim=-1), "config.json.*hidden_dim is -1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_files(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make_model().deploy().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(QuantizationError, match=f"(?s){message}"):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_dim": 34}, {"n_layers": 2}, {"bias": False}, {"quant_config": PER_ROW}])
def test_another_config_shows_without_metadata(change: dict[str, object], tmp_path: Path) -> None:
    make_model().deploy().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    AutoBitModel.from_pretrained(tmp_path)
    edit_config(**change)(tmp_path)
    with pytest.raises(QuantizationError, match=r"model\.safetensors: "):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("hidden_dim", [10**9, 2**40, 2**63])
def test_a_config_beyond_all_memory(hidden_dim: int, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    edit_config(hidden_dim=hidden_dim)(tmp_path)
    with pytest.raises(QuantizationError, match=r"(model\.safetensors|config\.json): "):
        AutoBitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("n_layers", [4, 10**6, 10**30])
@pytest.mark.parametrize("with_metadata", [False, True])
def test_a_config_of_more_layers_is_refused_before_it_is_built(
    n_layers: int, with_metadata: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().deploy().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path), path, {"n_layers": str(n_layers)} if with_metadata else None)
    edit_config(n_layers=n_layers)(tmp_path)

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


def test_threads_that_save_to_one_directory_disturb_nobody(tmp_path: Path, x: Tensor) -> None:
    model = make_model().deploy()
    expected = model(x)
    with ThreadPoolExecutor(4) as threads:
        for saved in [threads.submit(model.save_pretrained, tmp_path) for _ in range(40)]:
            saved.result()
    assert same_bits(AutoBitModel.from_pretrained(tmp_path)(x), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
