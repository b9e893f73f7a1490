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


def test_all_configs_are_eight() -> None:
    assert len(set(all_configs())) == 8
    assert {config.flags for config in all_configs()} == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    }


@pytest.mark.parametrize("argument", ["weight_granularity", "activation_dtype", "activation_granularity"])
@pytest.mark.parametrize("value", ["per_row", "int4", "", None, 8, ["int8"], np.array(["int8", "int8"])])
def test_a_value_that_does_not_exist(argument: str, value: Any) -> None:
    with pytest.raises(QuantizationError, match=argument) as caught:
        BitQuantConfig(**{argument: value})
    allowed = ("int8", "float32") if argument == "activation_dtype" else ("per_tensor", "per_channel")
    assert all(word in str(caught.value) for word in (repr(value), *allowed))


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="weight_dtype"):
        BitQuantConfig(weight_dtype="int2")  # type: ignore[call-arg]


def test_exceptions() -> None:
    assert issubclass(QuantizationError, BitLabError)
    assert issubclass(QuantizationError, ValueError)
    assert issubclass(KernelNotFoundError, BitLabError)
    assert issubclass(KernelNotFoundError, LookupError)
