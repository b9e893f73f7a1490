"""Model configs, the registry of models, AutoBitModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitmodels import (
    AutoBitModel,
    BitMLPConfig,
    BitMLPModel,
    BitModelBase,
    BitModelConfig,
    list_models,
    register_model,
)
from bitmodels.registry import unregister_model

PER_CHANNEL = BitQuantConfig("per_channel", "int8", "per_channel")


def test_mlp_config_takes_the_documented_arguments() -> None:
    config = BitMLPConfig(n_layers=3, in_channels=8, hidden_dim=16, out_channels=2, dropout=0.5)
    assert config == BitMLPConfig(3, 8, 16, 2, 0.5)
    assert config.quant_config == BitQuantConfig(activation_granularity="per_channel")
    assert config.widths == [8, 16, 16, 2]
    assert BitMLPConfig(1, 8, 16, 2).widths == [8, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"hidden_dim": 2.5}, r"hidden_dim is 2\.5"),
        ({"in_channels": True}, "in_channels is True"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"dropout": "0"}, "dropout is '0'"),
        ({"dropout": None}, "dropout is None"),
        ({"bias": "yes"}, "bias is 'yes'"),
        ({"quant_config": {"weight_granularity": "per_row"}}, "weight_granularity is 'per_row'"),
        ({"quant_config": {"weights": 1}}, "weights"),
        ({"quant_config": 3}, "quant_config is 3"),
        ({"width": 3}, "width"),
    ],
)
def test_a_config_with_a_wrong_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BitMLPConfig.from_dict(values)


def test_a_config_and_its_dict() -> None:
    config = BitMLPConfig(2, 5, 7, 3, 0.25, False, quant_config=PER_CHANNEL)
    assert BitMLPConfig.from_dict(config.to_dict()) == config
    assert BitMLPConfig.from_dict({}) == BitMLPConfig()
    assert config.to_metadata() == {
        "n_layers": "2",
        "in_channels": "5",
        "hidden_dim": "7",
        "out_channels": "3",
        "dropout": "0.25",
        "bias": "false",
        "quant_config.weight_granularity": "per_channel",
        "quant_config.activation_dtype": "int8",
        "quant_config.activation_granularity": "per_channel",
    }


def test_from_config_finds_the_class() -> None:
    config = BitMLPConfig(2, 5, 7, 3)
    model = AutoBitModel.from_config(config)
    assert type(model) is BitMLPModel
    assert model.config == config
    model = AutoBitModel.from_config(config, PER_CHANNEL)
    assert isinstance(model, BitMLPModel)
    assert model.config.quant_config == PER_CHANNEL
    assert {layer.quant_config for layer in model.layers} == {PER_CHANNEL}
    with pytest.raises(QuantizationError, match="BitModelConfig"):
        AutoBitModel.from_config(BitModelConfig())
    with pytest.raises(TypeError):
        AutoBitModel()


def test_mlp_layers() -> None:
    model = BitMLPModel(BitMLPConfig(3, 5, 7, 2, bias=False))
    assert [tuple(layer.get_parameter("weight").shape) for layer in model.layers] == [(7, 5), (7, 7), (2, 7)]
    assert all(layer.bias is None for layer in model.layers)
    assert model(torch.zeros(2, 4, 5)).shape == (2, 4, 2)
    with pytest.raises(QuantizationError, match="BitMLPConfig"):
        BitMLPModel(BitModelConfig())  # type: ignore[arg-type]


def test_mlp_dropout_and_relu() -> None:
    torch.manual_seed(0)
    model = BitMLPModel(BitMLPConfig(2, 5, 64, 2, dropout=0.5))
    x = torch.randn(3, 5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    first, last = model.layers
    assert torch.equal(model(x), last(first(x).clamp(min=0)))


@dataclasses.dataclass(frozen=True)
class TinyConfig(BitModelConfig):
    size: int = 4


@pytest.fixture
def tiny() -> Iterator[type[BitModelBase]]:
    @register_model("Tiny")
    class Tiny(BitModelBase):
        config_class = TinyConfig

        def __init__(self, config: BitModelConfig, quant_config: BitQuantConfig | None = None) -> None:
            super().__init__(config, quant_config)
            self.layer = nn.Linear(self.config.size, 1)
            self.register_buffer("unsaved", torch.full((1,), 2.0), persistent=False)
            self.plain = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x) * self.unsaved + self.plain
            return output

    yield Tiny
    unregister_model("Tiny")


def test_a_model_of_ones_own(tiny: type[BitModelBase], tmp_path: object) -> None:
    assert list_models() == ["bit_mlp", "Tiny"]
    model = AutoBitModel.from_config(TinyConfig(size=3))
    assert type(model) is tiny
    model.save_pretrained(str(tmp_path))
    loaded = AutoBitModel.from_pretrained(str(tmp_path))
    assert type(loaded) is tiny
    assert torch.equal(loaded(torch.ones(3)), model(torch.ones(3)))
    assert not model.is_deployed
    with pytest.raises(QuantizationError, match="no BitLinear"):
        model.deploy()


def test_a_name_or_config_that_is_taken(tiny: type[BitModelBase]) -> None:
    with pytest.raises(QuantizationError, match='"Tiny" is taken'):
        register_model("Tiny")(tiny)
    with pytest.raises(QuantizationError, match='TinyConfig is the config of model_type "Tiny"'):
        register_model("Tinier")(tiny)
    with pytest.raises(QuantizationError, match="Tinier"):
        unregister_model("Tinier")


def test_a_model_without_a_name_cannot_be_saved(tmp_path: object) -> None:
    with pytest.raises(QuantizationError, match="register_model"):
        BitModelBase(BitModelConfig()).save_pretrained(str(tmp_path))
