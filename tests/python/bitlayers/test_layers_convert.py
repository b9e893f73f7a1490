"""From nn.Linear to BitLinear, and a whole model's deployment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitlayers import BitLinear, convert, deploy, summary
from support import same_bits

CONFIG = BitQuantConfig("per_channel", "int8", "per_channel")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.again = self.first
        self.body = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.body(self.again(self.first(x))))
        return output


def test_from_linear_shares_the_parameters() -> None:
    linear = nn.Linear(5, 3, dtype=torch.bfloat16).eval()
    layer = BitLinear.from_linear(linear, CONFIG)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.quant_config == CONFIG
    assert not layer.training
    assert BitLinear.from_linear(nn.Linear(5, 3, bias=False)).bias is None


def test_convert_replaces_plain_linears_only() -> None:
    model = Block()
    parameters = dict(model.named_parameters())
    assert convert(model, CONFIG, skip=["head"]) is model
    assert isinstance(model.first, BitLinear)
    assert model.again is model.first
    assert isinstance(model.body[0], BitLinear)
    assert type(model.head) is nn.Linear
    assert not isinstance(model.attention.out_proj, BitLinear)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_convert_of_a_single_layer_and_of_an_unknown_name() -> None:
    assert isinstance(convert(nn.Linear(2, 2)), BitLinear)
    with pytest.raises(QuantizationError, match="tail"):
        convert(Block(), skip=["tail"])


class Decoder(nn.Module):
    """As a language model: an embedding, blocks, a head."""

    def __init__(self, head: str, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3)])
        self.add_module(head, nn.Linear(8, 11, bias=False))
        self.head_name = head
        if tied:
            self.get_submodule(head).weight = self.embedding.weight


class WithOutputEmbeddings(Decoder):
    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.head_name)


def ternary(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


EVERY = {f"layers.{index}.{name}" for index in range(3) for name in ("up", "down")}


@pytest.mark.parametrize(
    "model",
    [Decoder("lm_head", False), Decoder("out", True), WithOutputEmbeddings("out", False)],
    ids=["name", "tie", "method"],
)
def test_the_output_head_and_embeddings_are_left_alone(model: Decoder) -> None:
    assert ternary(convert(copy.deepcopy(model))) == EVERY
    assert ternary(convert(copy.deepcopy(model), skip=())) == EVERY | {model.head_name}


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        (["layers.1"], {"layers.1.up", "layers.1.down"}),
        (["*.up"], {f"layers.{index}.up" for index in range(3)}),
        (("layers.[02].down",), {"layers.0.down", "layers.2.down"}),
        ({"lm_head", "layers.?.*"}, EVERY | {"lm_head"}),
    ],
)
def test_convert_skips_names_and_patterns(skip: Any, skipped: set[str]) -> None:
    assert ternary(convert(Decoder("lm_head", False), skip=skip)) == (EVERY | {"lm_head"}) - skipped


def test_convert_asks_a_filter(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def wanted(module: nn.Linear, name: str) -> bool:
        asked.append(name)
        return module.out_features == 8 and "up" in name

    with caplog.at_level("INFO", logger="bitlayers"):
        model = convert(Decoder("lm_head", False), filter_fn=wanted)
    assert set(asked) == EVERY
    assert ternary(model) == {f"layers.{index}.up" for index in range(3)}
    assert "3 nn.Linear became BitLinear, 4 were left alone" in caplog.text
    assert "layers.0.down was left alone: filter_fn returned False" in caplog.text
    assert "lm_head was left alone: it is the output head" in caplog.text


@pytest.mark.parametrize("skip", ["lm_head", [1], [None]])
def test_skip_of_another_type(skip: Any) -> None:
    with pytest.raises(QuantizationError, match="skip is .*expected a collection of names"):
        convert(Decoder("lm_head", False), skip=skip)


@pytest.mark.parametrize("call", [convert, deploy, summary])
def test_no_module(call: Callable[[Any], object]) -> None:
    with pytest.raises(QuantizationError, match="model is a str, expected an nn.Module"):
        call("model")


def test_summary() -> None:
    model = convert(Decoder("lm_head", False), CONFIG)
    deploy(model.get_submodule("layers.1"))
    listed = summary(model)
    assert [layer.name for layer in listed.layers] == [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear)
    ]
    kinds = {layer.name: (layer.kind, layer.state, layer.quant_config) for layer in listed.layers}
    assert kinds["layers.0.up"] == ("ternary", "trainable", CONFIG)
    assert kinds["layers.1.down"] == ("ternary", "deployed", CONFIG)
    assert kinds["lm_head"] == ("float", "trainable", None)
    assert {layer.name: layer.bytes for layer in listed.layers}["layers.0.up"] == 4 * (8 * 8 + 8)
    lines = str(listed).splitlines()
    assert len(lines) == 1 + 7 + 1
    assert lines[-1].split() == ["total", f"{listed.bytes:,}"]


def test_deploy_of_a_model() -> None:
    x = torch.randn(3, 8)
    model = convert(Block(), CONFIG)
    expected = model.eval()(x)
    assert same_bits(deploy(model)(x), expected)
    with pytest.raises(StateError, match="deployed already"):
        deploy(model)
    with pytest.raises(QuantizationError, match="no BitLinear"):
        deploy(nn.ReLU())


def test_deploy_is_all_or_nothing() -> None:
    model = convert(Block(), CONFIG)
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="head"):
        deploy(model)
    assert not any(layer.is_deployed for layer in model.modules() if isinstance(layer, BitLinear))
    assert model.training


# --- layers that cannot be replaced ---------------------------------------------------------------------------------


def weight_norm(layer: nn.Linear) -> None:
    nn.utils.weight_norm(layer)


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=1)


def pruned_bias(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "bias", amount=1)


def forward_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda *_: None)


def backward_hook(layer: nn.Linear) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def state_dict_hook(layer: nn.Linear) -> None:
    layer.register_state_dict_post_hook(lambda *_: None)


def double(layer: nn.Linear) -> None:
    layer.double()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change", [weight_norm, pruned, pruned_bias, forward_hook, backward_hook, state_dict_hook, double]
)
def test_convert_is_all_or_nothing(change: Callable[[nn.Linear], None]) -> None:
    model = Block()
    change(model.head)
    with pytest.raises(QuantizationError, match=r"^head: "):
        convert(model, CONFIG)
    assert not any(isinstance(module, BitLinear) for module in model.modules())
    assert isinstance(convert(model, CONFIG, skip=["head"]).get_submodule("body.0"), BitLinear)


# --- torch's encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_converted_encoder_computes_with_its_layers(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 16)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    original = encoder.eval()(x, src_key_padding_mask=mask)
    model = convert(encoder.train(), CONFIG)
    expected = model(x, src_key_padding_mask=mask)  # Training mode has no fast path.
    evaluated = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated, expected)
    assert same_bits(deploy(model)(x, src_key_padding_mask=mask), evaluated)
    assert not torch.allclose(evaluated[~mask], original[~mask], atol=1e-3)


@torch.no_grad()
def test_an_encoder_that_was_left_alone_keeps_its_fast_path() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 4))
    encoder = convert(model, skip=["0"]).get_submodule("0")
    assert encoder.activation_relu_or_gelu == 1
