"""Weights of BitLinear that are not its own alone: tied to another module's, or computed from other parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear, convert, deploy
from core_helpers import PER_TOKEN
from layer_helpers import (
    PER_CHANNEL,
    SIZES,
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

# --- tied weights -----------------------------------------------------------------------------------------------------


def tied(other: nn.Module, layer: BitLinear) -> nn.ModuleDict:
    layer.weight = other.weight  # type: ignore[assignment]
    return nn.ModuleDict({"other": other, "layer": layer})


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "BitLinear": lambda: BitLinear(*SIZES, quant_config=PER_TOKEN).eval(),
    "Linear": lambda: nn.Linear(*SIZES),
    "Embedding": lambda: nn.Embedding(SIZES[1], SIZES[0]),
}


@pytest.mark.parametrize("state", TRAINABLE)
@pytest.mark.parametrize("kind", OTHERS)
def test_tied_weights_are_trained_as_one(kind: str, state: str, x: Tensor) -> None:
    model = tied(OTHERS[kind](), put_into(state, make_layer(PER_CHANNEL)))
    other, layer = model["other"], model["layer"]
    assert isinstance(layer, BitLinear)
    assert sum(parameter is layer.weight for parameter in model.parameters()) == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    inputs = torch.tensor([0, 3]) if kind == "Embedding" else x
    for _ in range(3):
        optimizer.zero_grad()
        before = layer(x)
        (before.pow(2).sum() + other(inputs).pow(2).sum()).backward()
        optimizer.step()
        assert layer.weight is other.weight
        assert not same_bits(layer(x), before)
        assert same_bits(layer(x), evaluate(layer, x))
        if isinstance(other, BitLinear):
            assert same_bits(other(x), evaluate(other, x))


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_deploying_one_of_two_leaves_the_weight_to_the_other(kind: str, x: Tensor) -> None:
    model = tied(OTHERS[kind](), layer_in("training"))
    other, layer = model["other"], model["layer"]
    assert isinstance(layer, BitLinear)
    weight, expected = layer.weight, layer(x)
    layer.deploy()
    assert other.weight is weight
    weight.neg_()
    assert same_bits(layer(x), expected)
    if isinstance(other, BitLinear):
        assert not other.is_deployed
        assert same_bits(other(x), evaluate(other, x))


@torch.no_grad()
def test_deploying_both_gives_each_a_copy_of_its_own(x: Tensor) -> None:
    model = tied(BitLinear(*SIZES, quant_config=PER_CHANNEL), layer_in("training"))
    model.eval()
    expected = [layer(x) for layer in model.values()]
    deploy(model)
    assert all(same_bits(layer(x), y) for layer, y in zip(model.values(), expected, strict=True))
    first, second = (buffers_of(layer)[1] for layer in model.values() if isinstance(layer, BitLinear))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    state = snapshot(model)
    assert {f"{name}.qweight" for name in model} <= set(state)
    fresh = tied(BitLinear(*SIZES, quant_config=PER_CHANNEL), layer_in("training", init_method="normal"))
    fresh.load_state_dict(state)
    assert all(same_bits(layer(x), y) for layer, y in zip(fresh.values(), expected, strict=True))


@pytest.mark.parametrize("state", TRAINABLE)
@torch.no_grad()
def test_loading_keeps_a_tie(state: str, x: Tensor) -> None:
    source = tied(nn.Embedding(SIZES[1], SIZES[0]), layer_in("training", init_method="normal"))
    target = tied(nn.Embedding(SIZES[1], SIZES[0]), layer_in(state))
    target.load_state_dict(source.state_dict())
    layer = target["layer"]
    assert isinstance(layer, BitLinear)
    assert layer.weight is target["other"].weight
    assert same_bits(layer(x), evaluate(layer, x))


@torch.no_grad()
def test_one_layer_in_two_places(x: Tensor) -> None:
    layer = BitLinear(8, 8, quant_config=PER_CHANNEL)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = x[:, :8]
    expected = model(x)
    assert same_bits(deploy(model)(x), expected)
    assert layer.is_deployed
    fresh = BitLinear(8, 8, quant_config=PER_CHANNEL)
    again = nn.Sequential(fresh, nn.ReLU(), fresh)
    again.load_state_dict(model.state_dict())
    assert same_bits(again.eval()(x), expected)


@torch.no_grad()
def test_convert_keeps_a_tie(x: Tensor) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(19, 37), "head": nn.Linear(37, 19)})
    model["head"].weight = model["embedding"].weight
    convert(model, PER_CHANNEL, skip=())
    head = model["head"]
    assert isinstance(head, BitLinear)
    assert head.weight is model["embedding"].weight


# --- computed weights -------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.linspace(-1, 1, weight.shape[1])


def doubled(layer: BitLinear) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def weight_norm(layer: BitLinear) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def orthogonal(layer: BitLinear) -> None:
    nn.utils.parametrizations.orthogonal(layer)


def old_weight_norm(layer: BitLinear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def pruned(layer: BitLinear) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def remove(layer: BitLinear) -> None:
    """What every one of them has a function for."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight")
    elif prune.is_pruned(layer):
        prune.remove(layer, "weight")
    else:
        nn.utils.remove_weight_norm(layer)


COMPUTED = [doubled, weight_norm, orthogonal, old_weight_norm, pruned]

computed_weights = pytest.mark.parametrize("compute", COMPUTED, ids=lambda compute: compute.__name__)


@computed_weights
@pytest.mark.parametrize("state", TRAINABLE)
def test_a_computed_weight_is_followed(compute: Callable[[BitLinear], None], state: str, x: Tensor) -> None:
    layer = layer_in(state)
    compute(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        before = layer(x)
        assert same_bits(before, evaluate(layer, x))
        optimizer.zero_grad()
        before.pow(2).sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()
        assert not same_bits(layer(x), before)
    assert same_bits(layer.train(state != "training")(x), evaluate(layer, x))
    with parametrize.cached():
        assert same_bits(layer(x), layer(x))


@computed_weights
@pytest.mark.parametrize("state", TRAINABLE)
def test_a_computed_weight_is_deployed_once_it_is_a_parameter(
    compute: Callable[[BitLinear], None], state: str, x: Tensor
) -> None:
    layer = layer_in(state)
    compute(layer)
    before, training, expected = snapshot(layer), layer.training, layer(x)
    message = r"weight is computed \(parametrized, weight_norm, pruning\); remove that first$"
    with pytest.raises(QuantizationError, match=f"^deploy: {message}"):
        layer.deploy()
    for assign in (False, True):
        with pytest.raises(QuantizationError, match=f"^qweight: {message}"):
            layer.load_state_dict(snapshot(layer_in("deployed")), assign=assign)
    assert_holds(layer, before)
    assert layer.training == training
    assert same_bits(layer(x), expected)
    remove(layer)
    assert type(layer) is BitLinear
    assert same_bits(layer(x), expected)
    assert same_bits(layer.deploy()(x), expected)
    assert set(layer.state_dict()) == {"bias", "qweight", "qweight_scale"}


@computed_weights
@torch.no_grad()
def test_states_and_copies_of_a_computed_weight(compute: Callable[[BitLinear], None], x: Tensor) -> None:
    source, target = layer_in("training", init_method="normal"), layer_in("evaluated")
    compute(source)
    compute(target)
    assert "weight" not in source.state_dict()
    if compute is not orthogonal:  # Torch's own state of it does not determine the weight.
        target.load_state_dict(source.state_dict())
        assert same_bits(target(x), source(x))
    if compute is not old_weight_norm:  # Its weight is no leaf, which torch does not copy.
        assert same_bits(copy.deepcopy(target)(x), target(x))
    target.to(torch.bfloat16)
    if compute is not orthogonal:
        assert same_bits(target(x.bfloat16()), evaluate(target, x.bfloat16()))


@torch.no_grad()
def test_a_computed_bias_goes_through_every_state(x: Tensor) -> None:
    layer = layer_in("training")
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    expected = layer(x)
    assert same_bits(layer.eval()(x), expected)
    assert same_bits(layer.deploy()(x), expected)
    state = snapshot(layer)
    assert set(state) == {"parametrizations.bias.original", "qweight", "qweight_scale"}
    other = layer_in("training", init_method="normal")
    parametrize.register_parametrization(other, "bias", nn.Tanh())
    other.load_state_dict(state)
    assert same_bits(other(x), expected)
    parametrize.remove_parametrizations(other, "bias")
    assert same_bits(other(x), expected)


def test_a_deployed_layer_has_no_weight_to_compute(x: Tensor) -> None:
    layer = layer_in("deployed")
    before = snapshot(layer)
    with pytest.raises(AttributeError):
        doubled(layer)
    assert_holds(layer, before)
    assert same_bits(layer(x), evaluate(layer, x))
