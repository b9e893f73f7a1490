"""What was saved is what is loaded, whatever happens around it; and what must not be saved is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel, register_model
from bitmodels.config import BitModelConfig
from support import same_bits

FLOAT32 = BitQuantConfig("per_channel", "float32", "per_channel")


def make_model(seed: int = 0, **changes: Any) -> BitMLPModel:
    torch.manual_seed(seed)
    return BitMLPModel(
        BitMLPConfig(**{"n_layers": 3, "in_channels": 20, "hidden_dim": 20, "out_channels": 5, **changes})
    )


def layer_of(model: BitMLPModel, index: int) -> BitLinear:
    layer = model.layers[index]
    assert isinstance(layer, BitLinear)
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1))


def reloaded(model: BitMLPModel, folder: Path) -> BitMLPModel:
    model.save_pretrained(folder)
    loaded = AutoBitModel.from_pretrained(folder)
    assert isinstance(loaded, BitMLPModel)
    return loaded


@pytest.mark.parametrize("deployed", [(), (1,), (0, 1, 2)], ids=str)
@torch.no_grad()
def test_layers_with_configs_and_states_of_their_own(deployed: tuple[int, ...], tmp_path: Path, x: Tensor) -> None:
    model = make_model().eval()
    layer_of(model, 1).quant_config = FLOAT32
    layer_of(model, 2).quant_config = BitQuantConfig(activation_granularity="per_tensor")
    for index in deployed:
        layer_of(model, index).deploy()
    expected = model(x)
    loaded = reloaded(model, tmp_path)
    assert [layer.quant_config for layer in loaded.layers] == [layer.quant_config for layer in model.layers]
    assert [layer.is_deployed for layer in loaded.layers] == [layer.is_deployed for layer in model.layers]
    assert same_bits(loaded(x), expected)
    assert json.loads((tmp_path / "config.json").read_text())["module_configs"] == {
        "layers.1": {"weight_granularity": "per_channel", "activation_dtype": "float32"},
        "layers.2": {"activation_granularity": "per_tensor"},
    }


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_ties_between_layers(deployed: bool, tmp_path: Path, x: Tensor) -> None:
    model = make_model().eval()
    model.layers[1].weight = model.layers[0].weight
    if deployed:
        model.layers[1] = layer_of(model, 0).deploy()
    expected = model(x)
    loaded = reloaded(model, tmp_path)
    name = "qweight" if deployed else "weight"
    assert getattr(loaded.layers[0], name) is getattr(loaded.layers[1], name)
    assert same_bits(loaded(x), expected)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert f"layers.1.{name}" not in file.keys()  # noqa: SIM118 (it is no dict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_default_dtype_and_device_do_not_matter(dtype: torch.dtype, deployed: bool, tmp_path: Path, x: Tensor) -> None:
    model = make_model().to(dtype).eval()
    expected = (model.deploy() if deployed else model)(x.to(dtype))
    model.save_pretrained(tmp_path)
    for default in (torch.float64, torch.float16):
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                loaded = AutoBitModel.from_pretrained(tmp_path)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {str(tensor.device) for tensor in loaded.state_dict().values()} == {"cpu"}
        assert {k: t.dtype for k, t in loaded.state_dict().items()} == {
            k: t.dtype for k, t in model.state_dict().items()
        }
        assert same_bits(loaded(x.to(dtype)).float(), expected.float())


@torch.no_grad()
def test_a_loaded_model_outlives_its_file(tmp_path: Path, x: Tensor) -> None:
    for seed, name in enumerate(("ours", "other")):
        make_model(seed, hidden_dim=300).deploy().save_pretrained(tmp_path / name)
    model = AutoBitModel.from_pretrained(tmp_path / "ours")
    expected = model(x)
    weights = tmp_path / "ours" / "model.safetensors"
    shutil.copyfile(tmp_path / "other" / "model.safetensors", weights)  # In place: the same inode.
    assert same_bits(model(x), expected)
    os.truncate(weights, 0)
    assert same_bits(model(x), expected)


@pytest.mark.parametrize(
    ("dropout", "written"), [(0.0, "0"), (0, "0.0"), (0.1, "1e-1"), (0.5, "0.50"), (0.25, "25E-2")]
)
def test_numbers_as_other_writers_write_them(dropout: float, written: str, tmp_path: Path, x: Tensor) -> None:
    model = make_model(dropout=dropout).deploy()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    changed = text.replace(f'"dropout": {json.dumps(dropout)}', f'"dropout": {written}')
    changed = changed.replace('"hidden_dim": 20', '"hidden_dim": 20.0')
    assert changed != text
    path.write_text("\ufeff" + changed, encoding="utf-8")  # A byte order mark, too.
    loaded = AutoBitModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert same_bits(loaded(x).detach(), model(x).detach())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["layers.1.weight", "layers.2.bias"])
def test_a_diverged_model_does_not_replace_a_good_one(value: float, name: str, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.get_parameter(name).reshape(-1)[3] = value
    with pytest.raises(QuantizationError, match=f"{name} holds NaN or infinity"):
        model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=f"{name} holds NaN or infinity"):
        model.save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_type_of_earlier_versions(tmp_path: Path, x: Tensor) -> None:
    model = make_model().deploy()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values["model_type"] == "bit_mlp"
    values["model_type"] = "BitMLPModel"
    del values["module_configs"]
    path.write_text(json.dumps(values))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"bit_mlp"', b'"bit_mlp"'))
    assert same_bits(AutoBitModel.from_pretrained(tmp_path)(x).detach(), model(x).detach())


@pytest.mark.parametrize("as_path", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
def test_paths(as_path: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(as_path(tmp_path))
    assert AutoBitModel.from_pretrained(as_path(tmp_path)).config == make_model().config


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_what_is_no_path(path: Any) -> None:
    for call in (make_model().save_pretrained, AutoBitModel.from_pretrained, BitMLPModel.from_pretrained):
        with pytest.raises((QuantizationError, TypeError), match="director|path"):
            call(path)


def test_a_directory_that_is_a_file_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        make_model().save_pretrained(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_models_and_configs_can_be_pickled(x: Tensor) -> None:
    model = make_model().eval()
    for candidate in (model, model.deploy()):
        restored = pickle.loads(pickle.dumps(candidate))
        assert restored.config == model.config
        assert same_bits(restored(x).detach(), model(x).detach())


@pytest.mark.parametrize("name", ["", None, 3])
def test_register_model_with_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(QuantizationError, match="model_type is"):
        register_model(name)


@pytest.mark.parametrize("model", [int, None, BitModelConfig])
def test_register_model_of_something_else(model: Any) -> None:
    with pytest.raises(QuantizationError, match="is no BitModelBase"):
        register_model("something_else")(model)
