"""BitLinear's packed copy of a trainable weight: made once, never out of date, never saved."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear
from bitlayers import BitLinear
from core_helpers import PER_TOKEN
from layer_helpers import (
    PER_CHANNEL,
    STATES,
    TRAINABLE,
    evaluate,
    layer_in,
    make_layer,
    noise,
    snapshot,
)
from support import same_bits

# --- changes of the weight --------------------------------------------------------------------------------------------


def swapped(layer: BitLinear) -> None:
    layer._packed = None  # What shares the weight's memory could not be swapped; torch refuses it.
    torch.utils.swap_tensors(layer.weight, nn.Parameter(noise()))


def freed_and_gathered_again(layer: BitLinear) -> None:
    """As FSDP does, without a word to the version counter."""
    storage = layer.weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    preserve_version = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
    with preserve_version(layer.weight), torch.no_grad():
        layer.weight.copy_(noise())


def compiled_step(layer: BitLinear) -> None:
    layer.weight.grad = noise()
    optimizer = torch.optim.SGD([layer.weight], lr=1.0, fused=True)
    torch.compile(optimizer.step, backend="aot_eager")()


CHANGES: dict[str, Callable[[BitLinear], object]] = {
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(noise())),
    "multiplied": lambda layer: layer.weight.mul_(noise()),
    "one row": lambda layer: layer.weight[0].neg_(),
    "one element of a view": lambda layer: layer.weight[0][3:4].add_(5),
    "index_put": lambda layer: layer.weight.index_put_((torch.tensor([0, 3]),), torch.tensor(9.0)),
    "through detach": lambda layer: layer.weight.detach().neg_(),
    "as out argument": lambda layer: torch.neg(layer.weight, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], -1.0),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(noise().flatten(), [layer.weight]),
    "copied into data": lambda layer: layer.weight.data.copy_(noise()),
    "other data": lambda layer: setattr(layer.weight, "data", noise()),
    "data of other strides": lambda layer: setattr(layer.weight, "data", noise().t().contiguous().t()),
    "through NumPy": lambda layer: layer.weight.detach().numpy().__imul__(-1),
    "freed and gathered again": freed_and_gathered_again,
    "swapped": swapped,
    "compiled step": compiled_step,
    "cast": lambda layer: layer.bfloat16().float(),
    "loaded": lambda layer: layer.load_state_dict(make_layer(init_method="normal").state_dict()),
    "another config": lambda layer: setattr(layer, "quant_config", PER_TOKEN),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_copy_follows_every_change(change: str, x: Tensor) -> None:
    layer = layer_in("evaluated")
    before = layer(x)
    CHANGES[change](layer)
    after = layer(x)
    assert not same_bits(after, before)
    assert same_bits(after, evaluate(layer, x))


@torch.no_grad()
def test_the_copy_follows_the_same_memory_transposed() -> None:
    layer = BitLinear(32, 32, quant_config=PER_CHANNEL).eval()
    x = torch.randn(3, 32)
    before = layer(x)
    layer.weight.data = layer.weight.data.t()
    assert not same_bits(layer(x), before)
    assert same_bits(layer(x), evaluate(layer, x))


def test_a_weight_of_another_shape_in_data_is_refused() -> None:
    layer = BitLinear(16, 8).eval()
    with torch.no_grad():
        layer(torch.randn(2, 16))
        layer.weight.data = torch.randn(8, 12)
        with pytest.raises(QuantizationError, match="16"):
            layer(torch.randn(2, 16))


DROPS: dict[str, Callable[[BitLinear], object]] = {
    "train": lambda layer: layer.train(),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "load_state_dict of a model": lambda layer: nn.Sequential(layer).load_state_dict({}, strict=False),
    "to": lambda layer: layer.to("cpu"),
    "half": lambda layer: layer.half(),
    "deploy": lambda layer: layer.deploy(),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_drops_the_copy(drop: str) -> None:
    """Its memory is free before something else makes it useless."""
    layer = layer_in("evaluated")
    assert layer._packed is not None
    DROPS[drop](layer)
    assert layer._packed is None


@torch.no_grad()
def test_a_bias_that_changes_shows_in_every_state(x: Tensor) -> None:
    for state in STATES:
        layer = layer_in(state)
        before = layer(x)
        assert layer.bias is not None
        layer.bias.add_(1)
        assert not same_bits(layer(x), before)
        assert same_bits(layer(x), evaluate(layer, x))


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_any_sequence_of_changes(seed: int, x: Tensor) -> None:
    """Evaluation, training mode and a cleanly prepared weight agree after every one of many changes."""
    rng, layer = random.Random(seed), layer_in("training")
    states = {state: snapshot(layer_in(state, init_method="normal")) for state in ("training", "deployed")}

    # torch's compiler keeps a reference to what a compiled step has changed, which cannot be swapped then.
    changes = [change for name, change in CHANGES.items() if name != "compiled step"]

    def change() -> None:
        rng.choice(changes)(layer)

    config = layer.quant_config

    def load() -> None:
        fitting = states if layer.quant_config == config else {"training"}  # The deployed one has scales per channel.
        layer.load_state_dict(states[rng.choice(sorted(fitting))], assign=False)

    def replace() -> None:
        layer.weight = nn.Parameter(noise(rng.randrange(100)))

    steps: list[Callable[[], object]] = [
        change,
        change,
        replace,
        lambda: layer.train(rng.random() < 0.5),
        lambda: layer.load_state_dict(states["training"], assign=False),
        lambda: layer.load_state_dict(copy.deepcopy(states["training"]), assign=True),
        lambda: layer.bfloat16().float(),
        lambda: copy.deepcopy(layer)(x),
    ]
    deployed_steps: list[Callable[[], object]] = [
        load,
        lambda: layer.half().float(),
        lambda: copy.deepcopy(layer)(x),
    ]
    for _ in range(40):
        rng.choice(deployed_steps if layer.is_deployed else [*steps, layer.deploy])()
        assert same_bits(layer(x), evaluate(layer, x))


# --- optimizers -------------------------------------------------------------------------------------------------------


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"foreach": foreach}) for name in ("SGD", "Adam", "NAdam", "RMSprop") for foreach in (False, True)),
    *((name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")),
    *((name, {}) for name in ("AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "RAdam", "Rprop")),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    ("Adam", {"amsgrad": True, "fused": True}),
]


@pytest.mark.parametrize("state", TRAINABLE)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_every_step_shows_at_once(name: str, options: dict[str, Any], state: str, x: Tensor) -> None:
    layer = layer_in(state)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)
    for _ in range(3):
        before = layer(x)
        optimizer.zero_grad()
        before.pow(2).sum().backward()
        optimizer.step()
        assert same_bits(layer(x), evaluate(layer, x))
    assert not same_bits(layer(x), before)


@pytest.mark.parametrize("size", [8, 64, 65])
def test_a_fused_step_of_one_row_shows_at_once(size: int) -> None:
    """No version counts it, and in a large weight no element is looked at that it changes."""
    layer = BitLinear(size, size).eval()
    optimizer = torch.optim.SGD([layer.weight], lr=10.0, fused=True)
    x = torch.randn(3, size)
    before = layer(x)
    before[:, 0].sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer(x)
        assert not same_bits(after, before)
        assert same_bits(after, evaluate(layer, x))


# --- when it is made --------------------------------------------------------------------------------------------------


@pytest.fixture
def count_packings(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[int] = []
    original = bitlinear.prepare_weights

    def counting(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(bitlinear, "prepare_weights", counting)
    return lambda: len(calls)


@torch.no_grad()
def test_the_copy_is_made_once(count_packings: Callable[[], int], x: Tensor) -> None:
    layer = make_layer().eval()
    for _ in range(3):
        layer(x)
    assert count_packings() == 1
    layer.eval()(x)
    assert count_packings() == 1
    layer.train().eval()(x)
    assert count_packings() == 2


@pytest.mark.parametrize(("size", "packings"), [(8, 1), (64, 1), (65, 2)])
def test_a_gradient_costs_a_small_weight_no_packing(
    count_packings: Callable[[], int], size: int, packings: int
) -> None:
    """All of its elements are compared with what they were."""
    layer = BitLinear(size, size).eval()
    for _ in range(2):
        layer(torch.randn(3, size)).sum().backward()
    assert count_packings() == packings


def test_a_step_of_others_leaves_the_copy(count_packings: Callable[[], int], x: Tensor) -> None:
    layer, other = make_layer().eval(), make_layer().eval()
    optimizer = torch.optim.AdamW([*layer.parameters(), *other.parameters()], fused=True)
    layer(x)
    other(x).sum().backward()
    optimizer.step()
    layer(x)
    assert count_packings() == 2


@torch.no_grad()
def test_a_state_of_a_functional_call(x: Tensor) -> None:
    for state in STATES:
        layer, other = layer_in(state), layer_in(state, init_method="normal")
        before = layer(x)
        assert same_bits(torch.func.functional_call(layer, snapshot(other), (x,)), other(x))
        assert same_bits(layer(x), before)


def test_an_inference_tensor_cannot_hide_a_change(x: Tensor) -> None:
    with torch.inference_mode():
        layer = make_layer().eval()
        before = layer(x)
        layer.weight.neg_()
        assert not same_bits(layer(x), before)


def test_a_copy_made_in_inference_mode_serves_autograd(x: Tensor) -> None:
    layer = make_layer().eval()
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None


@torch.no_grad()
def test_the_copy_is_never_saved(x: Tensor) -> None:
    layer = make_layer().eval()
    layer(x)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not list(layer.buffers())
    assert len(pickle.dumps(layer)) < len(pickle.dumps(make_layer())) + 64
    assert copy.deepcopy(layer)._packed is None
