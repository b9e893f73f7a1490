"""Bad input of layers and models: the documented exception, naming what is wrong; nothing half done remains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitlayers.bitlinear import BitLinear
from oracle import Schema
from support import config_of, same_bits

N, K = 19, 37
PAYLOAD = N * oracle.packed_columns(N, K)[0]


def layer_of(schema: Schema | None = None, *, deployed: bool = False) -> BitLinear:
    torch.manual_seed(95)
    layer = BitLinear(K, N, quant_config=config_of(schema or Schema()))
    if deployed:
        layer.deploy()
    return layer


def state_of(schema: Schema | None = None, *, deployed: bool = True) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer_of(schema, deployed=deployed).state_dict().items()}


# --- states ---------------------------------------------------------------------------------------------------------


def test_deploy_twice() -> None:
    layer = layer_of(deployed=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(StateError, match="deploy"):
        layer.deploy()
    assert layer.is_deployed
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_deploy_of_weight_that_is_not_finite_changes_nothing() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[3, 5] = torch.nan
    with pytest.raises(QuantizationError, match="weight"):
        layer.deploy()
    assert not layer.is_deployed
    assert layer.weight.shape == (N, K)
    with pytest.raises(QuantizationError, match="weight"), torch.no_grad():
        layer.eval()(torch.ones(K))


def test_training_with_weight_that_is_not_finite_gives_nan() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.weight[3, 5] = torch.nan
    assert layer(torch.ones(2, K)).isnan().all()


@pytest.mark.parametrize("deployed", [False, True])
def test_x_of_wrong_width(deployed: bool) -> None:
    layer = layer_of(deployed=deployed)
    for mode in (layer, layer.eval()):
        with pytest.raises(QuantizationError, match=r"x has 53 .*37"):
            mode(torch.ones(4, 53))
        with pytest.raises(QuantizationError, match=r"x has .*int64"):
            mode(torch.ones(4, K, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_features": 0, "out_features": 3}, "in_features is 0"),
        ({"in_features": 3, "out_features": -2}, "out_features is -2"),
        ({"in_features": 3, "out_features": 2, "init_method": "zen"}, "init_method.*zen"),
        ({"in_features": 3, "out_features": 2, "quant_config": "int8"}, "quant_config.*int8"),
        ({"in_features": 3, "out_features": 2, "quant_config": {"activation_dtype": "int8"}}, "quant_config"),
    ],
)
def test_arguments_of_the_layer(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantizationError, match=words):
        BitLinear(**arguments)


# --- state_dict -----------------------------------------------------------------------------------------------------


def flip(name: str, offset: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[offset] ^= 1

    return change


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({name: tensor})


def packed(n: int, k: int) -> torch.Tensor:
    return torch.from_numpy(oracle.pack(torch.ones(n, k, dtype=torch.int8).numpy()))


STATES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "payload": (flip("qweight", 7), "qweight"),
    "padding": (flip("qweight", PAYLOAD - 1), "qweight"),
    "magic": (flip("qweight", PAYLOAD), "qweight"),
    "version": (flip("qweight", PAYLOAD + 8), "qweight"),
    "layout": (flip("qweight", PAYLOAD + 12), "qweight"),
    "out_features": (flip("qweight", PAYLOAD + 16), "qweight"),
    "in_features": (flip("qweight", PAYLOAD + 24), "qweight"),
    "checksum": (flip("qweight", PAYLOAD + 32), "qweight"),
    "zeros": (flip("qweight", PAYLOAD + 63), "qweight"),
    "more rows": (put("qweight", packed(20, K)), "qweight.*20.*19"),
    "other width of as many bytes": (put("qweight", packed(N, 40)), "qweight.*(40.*37|37.*40)"),
    "other width": (put("qweight", packed(N, 100)), "qweight.*37"),
    "one dimension": (put("qweight", packed(N, K).flatten()), "qweight"),
    "int32 qweight": (put("qweight", packed(N, K).int()), "qweight.*int32.*uint8"),
    "zero scale": (put("qweight_scale", torch.tensor(0.0)), "qweight_scale"),
    "negative scale": (put("qweight_scale", torch.tensor(-1.0)), "qweight_scale"),
    "NaN scale": (put("qweight_scale", torch.tensor(torch.nan)), "qweight_scale"),
    "infinite scale": (put("qweight_scale", torch.tensor(torch.inf)), "qweight_scale"),
    "scale of another config": (put("qweight_scale", torch.ones(N)), "qweight_scale.*19.*per_tensor"),
    "integer scale": (put("qweight_scale", torch.tensor(1)), "qweight_scale.*int64.*float32"),
    "weight beside qweight": (put("weight", torch.ones(N, K)), "weight.*qweight"),
    "no scale": (lambda state: state.pop("qweight_scale"), "qweight_scale"),
    "no qweight": (lambda state: state.pop("qweight"), "qweight"),
}


@pytest.mark.parametrize("deployed", [False, True], ids=["into a trainable layer", "into a deployed layer"])
@pytest.mark.parametrize("name", STATES)
def test_state_dict(name: str, deployed: bool) -> None:
    """Refused, and the layer still computes what it did."""
    change, words = STATES[name]
    layer = layer_of(deployed=deployed).eval()
    with torch.no_grad():
        expected = layer(torch.ones(2, K))
    state = state_of()
    change(state)
    with pytest.raises(QuantizationError, match=f"(?s){words}"):
        layer.load_state_dict(state)
    assert layer.is_deployed == deployed
    with torch.no_grad():
        assert same_bits(layer(torch.ones(2, K)), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_state_dict_with_a_weight_that_is_not_finite(value: float) -> None:
    for deployed in (False, True):
        state = state_of(deployed=False)
        state["weight"][18, 36] = value
        with pytest.raises(QuantizationError, match="weight"):
            layer_of(deployed=deployed).load_state_dict(state)


def test_state_dict_of_a_layer_inside_a_model_is_named() -> None:
    model = nn.Sequential(nn.Identity(), layer_of())
    state = {f"1.{name}": tensor for name, tensor in state_of().items()}
    state["1.qweight"].view(-1)[3] ^= 1
    with pytest.raises(QuantizationError, match=r"1\.qweight"):
        model.load_state_dict(state)


def test_states_that_are_right_are_loaded() -> None:
    for schema in oracle.SCHEMAS:
        for deployed in (False, True):
            layer = layer_of(schema)
            with torch.no_grad():
                layer.weight.zero_()
            layer.load_state_dict(state_of(schema, deployed=deployed))
            assert layer.is_deployed == deployed
            with torch.no_grad():
                assert same_bits(layer.eval()(torch.ones(3, K)), layer_of(schema, deployed=True)(torch.ones(3, K)))


def test_config_of_a_deployed_layer_must_fit_its_scale() -> None:
    layer = layer_of(deployed=True)
    layer.quant_config = BitQuantConfig("per_channel")
    with pytest.raises(QuantizationError, match=r"qweight_scale.*19"):
        layer(torch.ones(K))


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_mixed_devices(deployed: bool, assign: bool) -> None:
    layer = layer_of(deployed=deployed)
    before = copy.deepcopy(layer.state_dict())
    for name in before:
        state = {key: tensor.to("meta") if key == name else tensor for key, tensor in before.items()}
        with pytest.raises(QuantizationError, match=rf"{name} on meta.*expected one device"):
            layer.load_state_dict(state, assign=assign)
    assert layer.is_deployed == deployed
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": True}, "in_features is True, expected an integer from 1 to 16777215"),
        ({"in_features": 2**24}, "in_features is 16777216, expected an integer from 1 to 16777215"),
        ({"in_features": 4.0}, r"in_features is 4\.0, expected an integer"),
        ({"out_features": True}, "out_features is True, expected an integer"),
        ({"out_features": 2**70}, "out_features is 1180591620717411303424, expected an integer"),
        ({"out_features": None}, "out_features is None, expected an integer"),
        ({"bias": "yes"}, "bias is 'yes', expected True or False"),
        ({"bias": 2}, "bias is 2, expected True or False"),
        ({"bias": None}, "bias is None, expected True or False"),
        ({"init_method": ["normal"]}, r"init_method is \['normal'\], expected"),
        ({"init_method": None}, "init_method is None, expected"),
        ({"quant_config": "int8"}, "quant_config is 'int8', expected a BitQuantConfig"),
        ({"dtype": torch.float64}, r"dtype is torch\.float64, expected one of torch\.float32"),
        ({"dtype": "float32"}, "dtype is float32, expected one of"),
    ],
)
def test_illegal_arguments_of_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BitLinear(**{"in_features": 4, "out_features": 4, **arguments})


def test_odd_but_legal_arguments_of_the_constructor() -> None:
    layer = BitLinear(np.int64(6), torch.Size([3])[0], 1, dtype=torch.bfloat16, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert (type(layer.in_features), layer.in_features, layer.out_features) == (int, 6, 3)
    assert layer.bias is not None
    assert BitLinear(1, 1, False)(torch.ones(1)).shape == (1,)
    assert BitLinear(2**24 - 1, 1, device="meta").weight.shape == (1, 2**24 - 1)


def test_a_default_dtype_that_no_layer_supports() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(QuantizationError, match=r"default dtype is torch\.float64.*give the layer a dtype"):
            BitLinear(4, 4)
        layer = BitLinear(4, 4, dtype=torch.float32)
        assert layer(torch.ones(2, 4, dtype=torch.float32)).dtype == torch.float32
        deployed = layer.deploy()
        assert deployed.qweight_scale is not None
        assert deployed.qweight_scale.dtype == torch.float32
        BitLinear(4, 4, dtype=torch.float32).load_state_dict(deployed.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
