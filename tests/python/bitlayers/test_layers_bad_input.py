"""Bad input of BitLinear: the documented exception, naming what is wrong; nothing half done remains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from bad_tensors import BAD, expect_named
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitcore.ops import bitlinear
from bitlayers import BitLinear
from layer_helpers import (
    SIZES,
    STATES,
    assert_holds,
    layer_in,
    make_layer,
    noise,
    snapshot,
)
from support import same_bits
from user_kernels import PATHS

# --- arguments --------------------------------------------------------------------------------------------------------


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"in_features": 0}, "in_features is 0, expected an integer from 1 to 16777215"),
    ({"in_features": True}, "in_features is True, expected an integer from 1 to 16777215"),
    ({"in_features": 2**24}, "in_features is 16777216, expected an integer from 1 to 16777215"),
    ({"in_features": 4.0}, r"in_features is 4\.0, expected an integer"),
    ({"in_features": "8"}, "in_features is '8', expected an integer"),
    ({"out_features": -2}, "out_features is -2, expected an integer"),
    ({"out_features": True}, "out_features is True, expected an integer"),
    ({"out_features": 2**70}, "out_features is 1180591620717411303424, expected an integer"),
    ({"out_features": None}, "out_features is None, expected an integer"),
    ({"bias": "yes"}, "bias is 'yes', expected True or False"),
    ({"bias": 2}, "bias is 2, expected True or False"),
    ({"bias": None}, "bias is None, expected True or False"),
    ({"init_method": "zen"}, "Unknown initialization method.*zen|init_method.*zen"),
    ({"init_method": ["normal"]}, r"init_method is \['normal'\], expected"),
    ({"init_method": None}, "init_method is None, expected"),
    ({"quant_config": "int8"}, "quant_config is 'int8', expected a BitQuantConfig"),
    ({"quant_config": {"activation_dtype": "int8"}}, "quant_config is {"),
    ({"dtype": torch.float64}, r"dtype is torch\.float64, expected one of torch\.float32"),
    ({"dtype": "float32"}, "dtype is float32, expected one of"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_of_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BitLinear(**{"in_features": 4, "out_features": 4, **arguments})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", STATES)
def test_x(state: str, path: str) -> None:
    layer = layer_in(state)
    with PATHS[path]():
        for kind, (x, word) in BAD.items():
            expect_named("x", word, partial(layer, x), kind)
        if path == "native":  # Others name the packed weight, or leave its own form to a kernel.
            with pytest.raises(QuantizationError, match=r"^x has 53 .*37"):
                layer(torch.ones(4, 53))
        with pytest.raises(QuantizationError, match=r"^(weight|qweight|qweight_scale|bias) is on cpu, x is on meta$"):
            layer(torch.ones(4, SIZES[0], device="meta"))


def test_calls_that_a_deployed_layer_does_not_allow() -> None:
    layer = layer_in("deployed")
    before = snapshot(layer)
    with pytest.raises(StateError, match="deploy: the layer is deployed already"):
        layer.deploy()
    with pytest.raises(StateError, match=r"reset_parameters.*deployed"):
        layer.reset_parameters()
    with pytest.raises(StateError, match="weight: the layer is deployed"):
        layer.weight = nn.Parameter(noise())
    layer.weight = None  # type: ignore[assignment]  # As it is.
    assert layer.is_deployed
    assert_holds(layer, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_weight_that_is_not_finite(value: float, x: Tensor) -> None:
    """Not prepared; in training the outputs are NaN and nothing is raised."""
    layer = make_layer().eval()
    layer.weight[3, 5] = value
    for call in (lambda: layer(x), layer.deploy):
        with pytest.raises(QuantizationError, match="weight"):
            call()
    assert not layer.is_deployed
    assert torch.isnan(layer.train()(x)).all()


def test_config_of_a_deployed_layer_must_fit_its_scale() -> None:
    layer = make_layer().deploy()
    layer.quant_config = BitQuantConfig("per_channel")
    with pytest.raises(QuantizationError, match=r"qweight_scale.*19"):
        layer(torch.ones(SIZES[0]))


# --- state_dicts ------------------------------------------------------------------------------------------------------


Change = Callable[[dict[str, Tensor]], object]
PAYLOAD = SIZES[1] * oracle.packed_columns(SIZES[1], SIZES[0])[0]


def flip(offset: int) -> Change:
    return lambda state: state["qweight"].view(-1)[offset].bitwise_xor_(1)


def put(name: str, tensor: Tensor) -> Change:
    return lambda state: state.update({name: tensor})


def packed(n: int, k: int) -> Tensor:
    return bitlinear.pack_weights(torch.ones(n, k, dtype=torch.int8))


DEPLOYED: dict[str, tuple[Change, str]] = {
    "payload": (flip(7), "qweight"),
    "padding": (flip(PAYLOAD - 1), "qweight"),
    "magic": (flip(PAYLOAD), "qweight"),
    "version": (flip(PAYLOAD + 8), "qweight"),
    "layout": (flip(PAYLOAD + 12), "qweight"),
    "out_features": (flip(PAYLOAD + 16), "qweight"),
    "in_features": (flip(PAYLOAD + 24), "qweight"),
    "checksum": (flip(PAYLOAD + 32), "qweight"),
    "zeros": (flip(PAYLOAD + 63), "qweight"),
    "more rows": (put("qweight", packed(20, 37)), "qweight.*20.*19"),
    "other width of as many bytes": (put("qweight", packed(19, 40)), "qweight.*(40.*37|37.*40)"),
    "other width": (put("qweight", packed(19, 100)), "qweight.*37"),
    "cut": (put("qweight", packed(19, 37)[:, :-1]), "qweight"),
    "one dimension": (put("qweight", packed(19, 37).flatten()), "qweight"),
    "int32 qweight": (put("qweight", packed(19, 37).int()), "qweight.*int32.*uint8"),
    "zero scale": (put("qweight_scale", torch.zeros(19)), "qweight_scale holds a scale"),
    "negative scale": (put("qweight_scale", -torch.ones(19)), "qweight_scale holds a scale"),
    "NaN scale": (put("qweight_scale", torch.full((19,), torch.nan)), "qweight_scale holds a scale"),
    "infinite scale": (put("qweight_scale", torch.full((19,), torch.inf)), "qweight_scale holds a scale"),
    "scale of another config": (put("qweight_scale", torch.tensor(1.0)), "qweight_scale.*19.*per_channel"),
    "scale of other rows": (put("qweight_scale", torch.ones(18)), r"qweight_scale has shape \(18,\), expected \(19,\)"),
    "integer scale": (put("qweight_scale", torch.ones(19).long()), "qweight_scale.*int64.*float32"),
    "double scale": (put("qweight_scale", torch.ones(19).double()), "qweight_scale has dtype torch.float64"),
    "weight beside qweight": (put("weight", torch.ones(19, 37)), "weight.*qweight"),
    "no scale": (lambda state: state.pop("qweight_scale"), "qweight_scale"),
    "no qweight": (lambda state: state.pop("qweight"), "qweight"),
}
WEIGHT: dict[str, tuple[Change, str]] = {
    "narrow weight": (put("weight", torch.zeros(19, 36)), r"weight has shape \(19, 36\), expected \(19, 37\)"),
    "infinite weight": (put("weight", torch.full((19, 37), torch.inf)), "weight holds NaN or infinity"),
    "NaN weight": (lambda state: state["weight"][18, 36:].fill_(torch.nan), "weight holds NaN or infinity"),
    "int8 weight": (put("weight", torch.zeros(19, 37, dtype=torch.int8)), "weight has dtype torch.int8"),
    "double weight": (put("weight", torch.zeros(19, 37, dtype=torch.float64)), "weight has dtype torch.float64"),
}
BIAS: dict[str, tuple[Change, str]] = {
    "short bias": (put("bias", torch.zeros(7)), r"bias has shape \(7,\), expected \(19,\)"),
    "NaN bias": (put("bias", torch.full((19,), torch.nan)), "bias holds NaN or infinity"),
    "infinite bias": (put("bias", torch.full((19,), -torch.inf)), "bias holds NaN or infinity"),
    "double bias": (put("bias", torch.zeros(19).double()), "bias has dtype torch.float64"),
    "integer bias": (put("bias", torch.zeros(19, dtype=torch.int32)), "bias has dtype torch.int32"),
}
UNFIT = [("deployed", *row) for row in [*DEPLOYED.values(), *BIAS.values()]]
UNFIT += [("training", *row) for row in [*WEIGHT.values(), *BIAS.values()]]
NAMES = [*DEPLOYED, *(f"{name}, deployed" for name in BIAS), *WEIGHT, *(f"{name}, trainable" for name in BIAS)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("source_state", "change", "message"), UNFIT, ids=NAMES)
def test_a_load_that_fails_loses_nothing(
    source_state: str, change: Change, message: str, state: str, x: Tensor
) -> None:
    for assign in (False, True):
        unfit = snapshot(layer_in(source_state, init_method="normal"))
        change(unfit)
        layer = layer_in(state)
        before, expected, training = snapshot(layer), layer(x), layer.training
        with pytest.raises(QuantizationError, match=f"(?s){message}"):
            layer.load_state_dict(unfit, assign=assign)
        assert_holds(layer, before)
        assert layer.training == training
        assert same_bits(layer(x), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_a_state_of_mixed_devices(state: str, assign: bool) -> None:
    layer = layer_in(state)
    before = snapshot(layer)
    for name in before:
        unfit = {key: tensor.to("meta") if key == name else tensor for key, tensor in before.items()}
        with pytest.raises(QuantizationError, match=rf"{name} on meta.*expected one device"):
            layer.load_state_dict(unfit, assign=assign)
    assert_holds(layer, before)


def test_a_layer_inside_a_model_is_named() -> None:
    model = nn.Sequential(nn.Identity(), layer_in("training"))
    state = {f"1.{name}": tensor for name, tensor in snapshot(layer_in("deployed")).items()}
    state["1.qweight"].view(-1)[3] ^= 1
    with pytest.raises(QuantizationError, match=r"1\.qweight"):
        model.load_state_dict(state)
