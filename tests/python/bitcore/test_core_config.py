"""BitQuantConfig and the exceptions."""

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from bitcore.config import BitQuantConfig, all_configs
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError


def test_defaults() -> None:
    assert BitQuantConfig() == BitQuantConfig("per_tensor", "int8", "per_channel")


def test_is_a_frozen_value() -> None:
    config = BitQuantConfig(weight_granularity="per_channel")
    assert len({config, BitQuantConfig("per_channel")}) == 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, activation_dtype="float32").flags == (True, False, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.activation_dtype = "float32"  # type: ignore[misc]


def test_all_configs() -> None:
    assert len(set(all_configs())) == len(all_configs()) == 8 + 4 * 5
    assert {config.flags for config in all_configs()[:8]} == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    }
    assert {config.group_size for config in all_configs()[:8]} == {128}
    for size in (32, 64, 128, 256):
        grouped = [config for config in all_configs()[8:] if config.group_size == size]
        assert [config.weight_granularity for config in grouped] == ["per_group"] * 5
        assert len({(config.activation_dtype, config.activation_granularity) for config in grouped}) == 5


@pytest.mark.parametrize("argument", ["weight_granularity", "activation_dtype", "activation_granularity"])
@pytest.mark.parametrize("value", ["per_row", "int4", "", None, 8, ["int8"], np.array(["int8", "int8"])])
def test_a_value_that_does_not_exist(argument: str, value: Any) -> None:
    with pytest.raises(QuantizationError, match=argument) as caught:
        BitQuantConfig(**{argument: value})
    allowed = ("int8", "float32") if argument == "activation_dtype" else ("per_tensor", "per_channel")
    assert all(word in str(caught.value) for word in (repr(value), *allowed))


@pytest.mark.parametrize("size", [0, 1, 16, 48, 127, 512, -32, 128.0, "128", None, True, [128]])
def test_a_group_size_that_does_not_exist(size: Any) -> None:
    with pytest.raises(QuantizationError, match="group_size") as caught:
        BitQuantConfig("per_group", group_size=size)
    assert all(word in str(caught.value) for word in (repr(size), "32, 64, 128 or 256"))


@pytest.mark.parametrize("weights", ["per_tensor", "per_channel"])
def test_a_group_size_that_would_be_ignored(weights: Any) -> None:
    with pytest.raises(QuantizationError, match=rf'group_size is 64 and weight_granularity is "{weights}".*128'):
        BitQuantConfig(weights, group_size=64)
    assert BitQuantConfig(weights, group_size=128) == BitQuantConfig(weights)


def test_activations_per_group_need_int8_and_weights_per_group() -> None:
    with pytest.raises(QuantizationError, match='activation_granularity is "per_group".*"per_channel"'):
        BitQuantConfig("per_channel", "int8", "per_group")
    with pytest.raises(QuantizationError, match='activation_granularity is "per_group".*"float32"'):
        BitQuantConfig("per_group", "float32", "per_group")


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="weight_dtype"):
        BitQuantConfig(weight_dtype="int2")  # type: ignore[call-arg]


def test_exceptions() -> None:
    assert issubclass(QuantizationError, BitLabError)
    assert issubclass(QuantizationError, ValueError)
    assert issubclass(KernelNotFoundError, BitLabError)
    assert issubclass(KernelNotFoundError, LookupError)
