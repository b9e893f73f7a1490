"""BitLinear in each of its states: changes of the weight, optimizers, state_dicts, copies, casts, tied weights, hooks,
computed weights, the meta device, threads."""

from __future__ import annotations

import copy
import io
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bitcore.exceptions import QuantizationError, StateError
from bitcore.ops import bitlinear
from bitlayers import BitLinear, convert, deploy
from core_helpers import PER_TOKEN
from layer_helpers import PER_CHANNEL, SIZES, STATES, buffers_of, evaluate, layer_in, make_layer, make_x, put_into
from support import same_bits

TRAINABLE = ("training", "evaluated")


@pytest.fixture
def x() -> Tensor:
    return make_x()


def noise(seed: int = 3) -> Tensor:
    return torch.randn(SIZES[1], SIZES[0], generator=torch.Generator().manual_seed(seed))


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_holds(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# --- in-place changes -----------------------------------------------------------------------------------------------


def copied(weight: Tensor) -> None:
    weight.copy_(noise())


def one_row(weight: Tensor) -> None:
    weight[0] = -weight[0]


def one_element_of_a_view(weight: Tensor) -> None:
    weight.view(-1)[3] += 5


def index_put(weight: Tensor) -> None:
    weight[torch.tensor([0, 3]), torch.tensor([1, 2])] = 9.0


def masked(weight: Tensor) -> None:
    weight.masked_fill_(weight > 0, 0.5)


def through_detach(weight: Tensor) -> None:
    weight.detach().neg_()


def initialized(weight: Tensor) -> None:
    nn.init.normal_(weight)


def out_argument(weight: Tensor) -> None:
    torch.neg(weight, out=weight)


def foreach(weight: Tensor) -> None:
    torch._foreach_mul_([weight], -1.0)


def vector_to_parameters(weight: Tensor) -> None:
    nn.utils.vector_to_parameters(noise().flatten(), [weight])


def clipped(weight: Tensor) -> None:
    weight.clamp_(-0.05, 0.01)


def swapped(weight: Tensor) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(noise()))


IN_PLACE = [
    copied,
    one_row,
    one_element_of_a_view,
    index_put,
    masked,
    through_detach,
    initialized,
    out_argument,
    foreach,
    vector_to_parameters,
    clipped,
    swapped,
]


@pytest.mark.parametrize("state", TRAINABLE)
@pytest.mark.parametrize("change", IN_PLACE, ids=lambda change: change.__name__)
@torch.no_grad()
def test_an_in_place_change_shows_at_once(change: Callable[[Tensor], None], state: str, x: Tensor) -> None:
    layer = layer_in(state)
    before = layer(x)
    change(layer.weight)
    assert not same_bits(layer(x), before)
    assert same_bits(layer(x), evaluate(layer, x))


def through_data(weight: Tensor) -> None:
    weight.data.neg_()


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= -1


@pytest.mark.parametrize("change", [through_data, through_numpy], ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_change_that_autograd_cannot_see_shows_after_train(change: Callable[[Tensor], None], x: Tensor) -> None:
    layer = layer_in("evaluated")
    before = layer(x)
    change(layer.weight)
    assert not same_bits(layer.train()(x), before)
    assert same_bits(layer.eval()(x), evaluate(layer, x))


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


# --- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"foreach": foreach}) for name in ("SGD", "Adam", "NAdam", "RMSprop") for foreach in (False, True)),
    *((name, {}) for name in ("Adadelta", "Adamax", "ASGD", "RAdam", "Rprop")),
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


def test_steps_of_lbfgs(x: Tensor) -> None:
    """It calls a closure several times between its own changes of the weight."""
    layer = layer_in("evaluated")
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        y = layer(x)
        assert same_bits(y, evaluate(layer, x))
        loss = y.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same_bits(layer(x), evaluate(layer, x))


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_of_a_scaler(overflow: bool, x: Tensor) -> None:
    """A step that the scaler skips, because a gradient is infinite, leaves the weight and the output."""
    layer = layer_in("evaluated")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = layer(x)
    scaler.scale(before.pow(2).sum()).backward()
    if overflow:
        assert layer.weight.grad is not None
        layer.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(layer(x), before) == overflow
    assert same_bits(layer(x), evaluate(layer, x))


@pytest.mark.parametrize("state", TRAINABLE)
def test_gradients_accumulate(state: str, x: Tensor) -> None:
    layer = layer_in(state)
    total = torch.zeros_like(layer.weight)
    for part in (x[:2], x[2:], x):
        alone = copy.deepcopy(layer)
        alone.zero_grad()
        for each in (layer, alone):
            each(part).pow(2).sum().backward()
        assert alone.weight.grad is not None
        total += alone.weight.grad
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, total)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
@torch.no_grad()
def test_an_average_of_the_weights(average: Any, x: Tensor) -> None:
    layer = layer_in("training")
    averaged = AveragedModel(layer, multi_avg_fn=average)
    average_layer = averaged.eval().module
    assert isinstance(average_layer, BitLinear)
    expected = torch.zeros_like(layer.weight)
    for step in range(3):
        layer.weight.copy_(noise(step))
        averaged.update_parameters(layer)
        if average is None or step == 0:
            expected = (expected * step + layer.weight) / (step + 1)
        else:
            expected = 0.9 * expected + 0.1 * layer.weight
        torch.testing.assert_close(average_layer.weight, expected)
        assert same_bits(averaged(x), evaluate(average_layer, x))


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_any_sequence_of_changes(seed: int, x: Tensor) -> None:
    """Evaluation, training mode and a cleanly prepared weight agree after every one of many changes."""
    rng, layer = random.Random(seed), layer_in("training")
    states = {state: snapshot(layer_in(state, init_method="normal")) for state in ("training", "deployed")}

    def change() -> None:
        rng.choice(IN_PLACE)(layer.weight)

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
        lambda: layer.load_state_dict(states[rng.choice(("training", "deployed"))], assign=False),
        lambda: layer.half().float(),
        lambda: copy.deepcopy(layer)(x),
    ]
    for _ in range(40):
        rng.choice(deployed_steps if layer.is_deployed else [*steps, layer.deploy])()
        assert same_bits(layer(x), evaluate(layer, x))


# --- frozen layers, hooks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_a_frozen_layer_passes_the_same_gradient_on(state: str, x: Tensor) -> None:
    gradients = []
    for frozen in (False, True):
        layer = layer_in(state).requires_grad_(not frozen)
        leaf = x.clone().requires_grad_()
        layer(leaf).pow(2).sum().backward()
        gradients.append(leaf.grad)
        assert all((parameter.grad is None) == frozen for parameter in layer.parameters())
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_hooks_are_called_in_every_state_and_outlive_each_change(x: Tensor) -> None:
    layer, calls = layer_in("training"), list[str]()

    def add_one(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        calls.append("forward")
        return y + 1

    def note_backward(module: nn.Module, dx: Any, dy: Any) -> None:
        calls.append(f"backward {tuple(dx[0].shape)}")

    layer.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    layer.register_forward_hook(add_one)
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre"))
    layer.register_full_backward_hook(note_backward)
    trainable, deployed = snapshot(layer), snapshot(layer_in("deployed"))
    changes: list[Callable[[], object]] = [
        lambda: None,
        layer.eval,
        layer.deploy,
        lambda: layer.load_state_dict(trainable),
        layer.train,
        lambda: layer.load_state_dict(deployed, assign=True),
    ]
    for change in changes:
        change()
        calls.clear()
        y = layer(x.clone().requires_grad_())
        assert same_bits(y.detach(), evaluate(layer, x) + 1)
        y.sum().backward()
        assert calls == ["forward_pre", "forward", "backward_pre", "backward (5, 37)"]


def test_hooks_of_state_dicts(x: Tensor) -> None:
    """Names that a hook gives the tensors on the way out, another takes back on the way in."""
    source, target = layer_in("deployed"), layer_in("training", init_method="normal")

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state[f"{prefix}codes"] = state.pop(f"{prefix}qweight")

    source.register_state_dict_post_hook(rename)
    state = source.state_dict()
    assert set(state) == {"codes", "qweight_scale", "bias"}
    state["qweight"] = state.pop("codes")
    loaded = list[str]()
    target.register_load_state_dict_post_hook(lambda module, keys: loaded.extend([*keys.missing_keys, "called"]))
    target.load_state_dict(state)
    assert loaded == ["called"]
    assert same_bits(target(x), source(x))


# --- state_dicts ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("state", STATES)
def test_a_prefix_and_a_destination(state: str) -> None:
    destination: dict[str, Tensor] = {"other": torch.zeros(1)}
    layer = layer_in(state)
    layer.state_dict(destination=destination, prefix="a.b.")
    assert set(destination) == {"other", *(f"a.b.{name}" for name in layer.state_dict())}
    assert all(not tensor.requires_grad for tensor in destination.values())
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias


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


UNFIT: list[tuple[str, Tensor, str]] = [
    ("bias", torch.zeros(7), r"bias has shape \(7,\), expected \(19,\)"),
    ("bias", torch.full((19,), torch.nan), "bias holds NaN or infinity"),
    ("weight", torch.zeros(19, 36), r"weight has shape \(19, 36\), expected \(19, 37\)"),
    ("weight", torch.full((19, 37), torch.inf), "weight holds NaN or infinity"),
    ("weight", torch.zeros(19, 37, dtype=torch.int8), "weight has dtype torch.int8"),
    ("qweight", torch.zeros(19, 16, dtype=torch.uint8), "qweight"),
    ("qweight_scale", torch.zeros(19), "qweight_scale holds a scale"),
    ("qweight_scale", torch.ones(18), r"qweight_scale has shape \(18,\), expected \(19,\)"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("name", "tensor", "message"), UNFIT)
def test_a_load_that_fails_loses_nothing(
    name: str, tensor: Tensor, message: str, state: str, assign: bool, x: Tensor
) -> None:
    for source_state in ("training", "deployed"):
        source = snapshot(layer_in(source_state, init_method="normal"))
        if name not in source:
            continue
        layer = layer_in(state)
        before, expected, training = snapshot(layer), layer(x), layer.training
        with pytest.raises(QuantizationError, match=message):
            layer.load_state_dict({**source, name: tensor}, assign=assign)
        assert_holds(layer, before)
        assert layer.training == training
        assert same_bits(layer(x), expected)


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


@torch.no_grad()
def test_a_state_of_a_functional_call(x: Tensor) -> None:
    for state in STATES:
        layer, other = layer_in(state), layer_in(state, init_method="normal")
        before = layer(x)
        assert same_bits(torch.func.functional_call(layer, snapshot(other), (x,)), other(x))
        assert same_bits(layer(x), before)


def test_a_weight_for_a_deployed_layer_is_refused(x: Tensor) -> None:
    layer = layer_in("deployed")
    before = snapshot(layer)
    with pytest.raises(StateError, match="weight: the layer is deployed"):
        layer.weight = nn.Parameter(noise())
    assert_holds(layer, before)
    layer.weight = None  # type: ignore[assignment]  # As it is.
    assert same_bits(layer(x), evaluate(layer, x))


# --- copies ---------------------------------------------------------------------------------------------------------


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


def test_a_copy_of_a_model_keeps_its_ties() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(19, 37), "head": layer_in("evaluated")})
    model["head"].weight = model["embedding"].weight
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone["head"].weight is clone["embedding"].weight
        assert clone["head"].weight is not model["head"].weight


# --- casts and moves ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in_place", "overwrite", "swap"])
def conversion(request: pytest.FixtureRequest) -> Iterator[str]:
    """The three ways in which torch can put a converted parameter into its module."""
    switches = {
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
        "swap": torch.__future__.set_swap_module_params_on_conversion,
    }
    switch = switches.get(request.param)
    if switch is not None:
        switch(True)
    yield request.param
    if switch is not None:
        switch(False)


CASTS: list[tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = [
    (lambda layer: layer.half(), torch.float16),
    (lambda layer: layer.bfloat16(), torch.bfloat16),
    (lambda layer: layer.to(torch.float16), torch.float16),
    (lambda layer: layer.to("cpu", torch.bfloat16, non_blocking=True), torch.bfloat16),
    (lambda layer: layer.to(torch.zeros((), dtype=torch.float16)), torch.float16),
    (lambda layer: layer.type(torch.bfloat16), torch.bfloat16),
    (lambda layer: layer.double().half(), torch.float16),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_casts(state: str, nested: bool, conversion: str, x: Tensor) -> None:
    for cast, dtype in CASTS:
        layer = layer_in(state)
        expected = copy.deepcopy(layer)
        for parameter in expected.parameters():
            parameter.data = parameter.data.to(dtype)
        cast(nn.Sequential(layer) if nested else layer)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert_holds(layer, snapshot(expected))
        assert same_bits(layer(x.to(dtype)), evaluate(expected, x.to(dtype)))
        if state == "deployed":
            scale, qweight = buffers_of(layer)
            assert (scale.dtype, qweight.dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_loading_where_torch_swaps_tensors(state: str, conversion: str, x: Tensor) -> None:
    for source_state in STATES:
        layer, source = layer_in(state), layer_in(source_state, init_method="normal")
        layer.load_state_dict(source.state_dict())
        assert_holds(layer, snapshot(source))
        assert same_bits(layer.eval()(x), evaluate(source, x))


def test_weights_of_double_precision_are_refused(x: Tensor) -> None:
    for state, name in (("training", "weight"), ("evaluated", "weight"), ("deployed", "bias")):
        layer = layer_in(state).double()
        with pytest.raises(QuantizationError, match=f"{name} has dtype float64"):
            layer(x)
        assert same_bits(layer.float()(x), layer_in(state)(x))


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_to_meta_and_back(state: str, x: Tensor) -> None:
    """What lies on the meta device has a shape alone; to_empty() gives it memory, load_state_dict() values."""
    layer = layer_in(state)
    before, expected = snapshot(layer), layer(x)
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    y = layer(torch.empty(5, SIZES[0], device="meta"))
    assert y.is_meta
    assert y.shape == (5, SIZES[1])
    with pytest.raises(QuantizationError, match="meta.*cpu|cpu.*meta"):
        layer(x)
    layer.to_empty(device="cpu")
    if state == "deployed":
        buffers_of(layer)[1].zero_()
        with pytest.raises(QuantizationError):
            layer(x)
    layer.load_state_dict(before)
    assert same_bits(layer(x), expected)


# --- tied weights ---------------------------------------------------------------------------------------------------


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


# --- computed weights -----------------------------------------------------------------------------------------------


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


# --- the meta device ------------------------------------------------------------------------------------------------


def by_argument() -> BitLinear:
    return BitLinear(*SIZES, quant_config=PER_CHANNEL, device="meta")


def by_context() -> BitLinear:
    with torch.device("meta"):
        return BitLinear(*SIZES, quant_config=PER_CHANNEL)


def by_skip_init() -> BitLinear:
    layer = nn.utils.skip_init(BitLinear, *SIZES, quant_config=PER_CHANNEL, device="cpu")
    assert isinstance(layer, BitLinear)
    return layer.to("meta")


on_meta = pytest.mark.parametrize("build", [by_argument, by_context, by_skip_init], ids=lambda build: build.__name__)


@on_meta
@pytest.mark.parametrize("state", TRAINABLE)
def test_a_layer_without_memory_is_initialized_later(build: Callable[[], BitLinear], state: str, x: Tensor) -> None:
    layer = put_into(state, build())
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_holds(layer, snapshot(make_layer()))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert same_bits(layer(x), evaluate(layer, x))


@on_meta
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("source_state", ["training", "deployed"])
@torch.no_grad()
def test_a_layer_without_memory_is_loaded_later(
    build: Callable[[], BitLinear], state: str, source_state: str, x: Tensor
) -> None:
    source, layer = layer_in(source_state), put_into(state, build())
    loaded = snapshot(source)
    layer.load_state_dict(loaded, assign=True)
    assert_holds(layer, loaded)
    assert layer.is_deployed == source.is_deployed
    assert not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert same_bits(layer.eval()(x), evaluate(source, x))


@pytest.mark.parametrize("source_state", ["training", "deployed"])
def test_values_for_a_layer_without_memory_are_torchs_no_op(source_state: str) -> None:
    layer = by_argument()
    with pytest.warns(UserWarning, match="meta"):
        layer.load_state_dict(snapshot(layer_in(source_state)))
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_a_model_without_memory(x: Tensor) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(BitLinear(37, 16), nn.ReLU(), nn.Linear(16, 8), BitLinear(8, 3, bias=False))

    source = deploy(make())
    with torch.device("meta"):
        model = make()
    assert deploy(model)(torch.empty(5, 37, device="meta")).shape == (5, 3)
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(model(x), source(x))


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_a_layer_with_memory_keeps_it_inside_the_meta_context(state: str, x: Tensor) -> None:
    layer, states = layer_in(state), [snapshot(layer_in(source)) for source in ("training", "deployed")]
    with torch.device("meta"):
        assert same_bits(layer.eval()(x), evaluate(layer, x))
        for loaded in states:
            layer.load_state_dict(loaded)
            assert same_bits(layer(x), evaluate(layer, x))
        layer.load_state_dict(states[0])
        layer.deploy()
    assert same_bits(layer(x), evaluate(layer, x))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}


# --- threads --------------------------------------------------------------------------------------------------------


def run_threads(*work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(task: Callable[[], object]) -> None:
        try:
            with torch.no_grad():
                task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


@pytest.mark.parametrize("moment", ["before", "after"])
@torch.no_grad()
def test_a_change_while_another_thread_packs_outdates_the_copy(
    moment: str, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    """The change falls between the look at the weight's version and the storing of the copy."""
    layer = layer_in("training").eval()
    original = bitlinear.prepare_weights
    calls = list[str]()

    def prepare(weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        calls.append(moment)
        if moment == "before":
            run_threads(lambda: layer.weight.copy_(noise()))
        prepared = original(weight, *args)
        if moment == "after":
            run_threads(lambda: layer.weight.copy_(noise()))
        return prepared

    monkeypatch.setattr(bitlinear, "prepare_weights", prepare)
    layer(x)
    monkeypatch.setattr(bitlinear, "prepare_weights", original)
    assert calls == [moment]
    assert same_bits(layer(x), evaluate(layer, x))


def test_forwards_beside_changes_in_place(x: Tensor) -> None:
    """While the weight changes a result may mix old and new values; afterwards it is the new one."""
    layer = layer_in("evaluated")
    done = threading.Event()

    def change() -> None:
        for step in range(60):
            layer.weight.copy_(noise(step))
        done.set()

    def compute() -> None:
        while not done.is_set():
            y = layer(x)
            assert y.shape == (5, SIZES[1])
            assert torch.isfinite(y).all()

    run_threads(change, compute, compute)
    with torch.no_grad():
        assert same_bits(layer(x), evaluate(layer, x))


def test_forwards_beside_replacements_see_one_weight_or_the_other(x: Tensor) -> None:
    layer = layer_in("evaluated")
    weights = [nn.Parameter(noise(seed)) for seed in range(2)]
    expected = []
    for weight in weights:
        layer.weight = weight
        expected.append(evaluate(layer, x))
    done = threading.Event()

    def replace() -> None:
        for step in range(300):
            layer.weight = weights[step % 2]
        done.set()

    def compute() -> None:
        while not done.is_set():
            y = layer(x)
            assert any(same_bits(y, each) for each in expected)

    run_threads(replace, compute, compute)


# --- compiled in place ----------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_layer_compiled_in_place_goes_through_its_states(x: Tensor) -> None:
    layer = layer_in("training")
    expected = layer(x).detach()
    layer.compile(backend="aot_eager")
    assert same_bits(layer(x), expected)
    with torch.no_grad():
        assert same_bits(layer.eval()(x), expected)
        layer.weight.neg_()
        assert same_bits(layer(x), evaluate(layer, x))
        layer.weight.neg_()
        assert same_bits(layer.deploy()(x), expected)
