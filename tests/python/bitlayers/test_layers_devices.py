"""BitLinear is cast, moved, emptied on the meta device and filled again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bitcore.exceptions import QuantizationError
from bitlayers import BitLinear, deploy
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

# --- casts and moves --------------------------------------------------------------------------------------------------


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


# --- the meta device --------------------------------------------------------------------------------------------------


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
