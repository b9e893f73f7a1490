"""save_pretrained and from_pretrained: what is saved comes back, and nothing damaged does."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import StateError
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel
from core_helpers import CONFIGS, id_of
from support import same_bits

SIZES = (3, 20, 33, 5)


def make_model(config: BitQuantConfig | None = None, bias: bool = True) -> BitMLPModel:
    torch.manual_seed(0)
    return BitMLPModel(BitMLPConfig(*SIZES, bias=bias), config).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
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


def test_threads_that_save_to_one_directory_disturb_nobody(tmp_path: Path, x: Tensor) -> None:
    model = make_model().deploy()
    expected = model(x)
    with ThreadPoolExecutor(4) as threads:
        for saved in [threads.submit(model.save_pretrained, tmp_path) for _ in range(40)]:
            saved.result()
    assert same_bits(AutoBitModel.from_pretrained(tmp_path)(x), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
