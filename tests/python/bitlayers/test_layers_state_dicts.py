"""BitLinear's state_dicts: every state loads into every state; copies, and what loading leaves as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitlayers import BitLinear
from core_helpers import CONFIGS, id_of
from layer_helpers import (
    PER_CHANNEL,
    SIZES,
    STATES,
    TRAINABLE,
    assert_holds,
    buffers_of,
    evaluate,
    layer_in,
    make_layer,
    put_into,
    snapshot,
)
from support import same_bits

# --- from state to state ----------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A BitLinear two levels down, beside other things."""

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(SIZES[0]), "layer": layer})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["layer"](self.block["norm"](x))
        return y

    @property
    def layer(self) -> BitLinear:
        layer = self.block["layer"]
        assert isinstance(layer, BitLinear)
        return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target_state", STATES)
@pytest.mark.parametrize("source_state", STATES)
@torch.no_grad()
def test_every_state_loads_into_every_state(source_state: str, target_state: str, assign: bool, x: Tensor) -> None:
    source, target = Nested(layer_in(source_state)), Nested(layer_in(target_state, init_method="normal"))
    state = source.state_dict()
    names = {"weight"} if source_state in TRAINABLE else {"qweight", "qweight_scale"}
    assert set(state) == {f"block.layer.{name}" for name in names | {"bias"}} | {"block.norm.weight", "block.norm.bias"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    result = target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert target.layer.is_deployed == (source_state == "deployed")
    assert target.layer.training == (target_state == "training")
    assert_holds(target, state)
    source.eval()
    target.eval()
    assert same_bits(target(x), source(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source_state", STATES)
@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@torch.no_grad()
def test_a_state_of_every_config(config: BitQuantConfig, source_state: str, assign: bool, x: Tensor) -> None:
    """The state decides what the layer becomes, and loading never changes the mode. Twice is as once."""
    source, layer = put_into(source_state, make_layer(config)), make_layer(config, init_method="normal")
    for _ in range(2):
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert layer.is_deployed == (source_state == "deployed")
        assert (layer._parameters["weight"] is None) == layer.is_deployed
        assert layer.training
        assert same_bits(layer(x), source(x)) or config.activation_dtype == "float32"
    assert same_bits(layer.eval()(x), source.eval()(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_scale_is_float32(assign: bool) -> None:
    state = make_layer(PER_CHANNEL).deploy().state_dict()
    state["qweight_scale"] = state["qweight_scale"].half()
    layer = BitLinear(*SIZES, quant_config=PER_CHANNEL)
    layer.load_state_dict(state, assign=assign)
    assert buffers_of(layer)[0].dtype == torch.float32


@pytest.mark.parametrize("state", STATES)
def test_loading_keeps_the_parameters_that_an_optimizer_knows(state: str, x: Tensor) -> None:
    layer = layer_in(state)
    known = dict(layer.named_parameters())
    layer.load_state_dict(snapshot(layer_in(state, init_method="normal")))
    assert all(parameter is known[name] for name, parameter in layer.named_parameters())


def test_a_frozen_weight_stays_frozen_and_a_new_one_can_be_trained(x: Tensor) -> None:
    layer, state = layer_in("training").requires_grad_(False), snapshot(layer_in("training"))
    for assign in (False, True):
        layer.load_state_dict(copy.deepcopy(state), assign=assign)
        assert not layer.weight.requires_grad
    layer.deploy().load_state_dict(state)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("source_state", STATES)
@pytest.mark.parametrize("target_state", STATES)
def test_loading_that_is_not_strict(source_state: str, target_state: str, x: Tensor) -> None:
    source, target = layer_in(source_state), layer_in(target_state, init_method="normal")
    state = {**snapshot(source), "extra": torch.zeros(1)}
    del state["bias"]
    bias = copy.deepcopy(target.bias)
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias"]
    assert result.unexpected_keys == ["extra"]
    assert target.is_deployed == source.is_deployed
    assert torch.equal(target.bias, bias)
    source.bias = bias
    assert same_bits(target.eval()(x), source.eval()(x))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias.*|Unexpected key.*extra"):
        target.load_state_dict(state)


@pytest.mark.parametrize("state", STATES)
def test_an_empty_state_leaves_a_layer_as_it_is(state: str, x: Tensor) -> None:
    layer = layer_in(state)
    before = snapshot(layer)
    result = layer.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == set(before)
    assert_holds(layer, before)
    assert layer.is_deployed == (state == "deployed")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    assert_holds(layer, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", ["training", "deployed"])
def test_a_state_read_in_inference_mode_serves_autograd(state: str, assign: bool, x: Tensor) -> None:
    """With assign=True the layer is given the very tensors that were read."""
    layer, source = layer_in("training", bias=False), layer_in(state, init_method="normal", bias=False)
    with torch.inference_mode():
        layer.load_state_dict(snapshot(source), assign=assign)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    assert same_bits(layer(x).detach(), source(x).detach())


# --- copies -----------------------------------------------------------------------------------------------------------


def saved_whole(layer: BitLinear) -> BitLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: BitLinear = torch.load(file, weights_only=False)
    return loaded


def pickled(layer: BitLinear) -> BitLinear:
    loaded: BitLinear = pickle.loads(pickle.dumps(layer))
    return loaded


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_a_copy_stands_alone(state: str, clone: Callable[[BitLinear], BitLinear], x: Tensor) -> None:
    layer = layer_in(state)
    before, expected = snapshot(layer), layer(x)
    other = clone(layer)
    assert (other.training, other.is_deployed) == (layer.training, layer.is_deployed)
    assert other.quant_config == PER_CHANNEL
    assert_holds(other, before)
    assert same_bits(other(x), expected)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert_holds(layer, before)
    assert same_bits(layer(x), expected)
    if state != "deployed":
        other.load_state_dict(before)
        assert same_bits(other.deploy()(x), evaluate(layer, x))
        assert not layer.is_deployed
