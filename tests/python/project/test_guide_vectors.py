"""docs/guides/test-vectors.json against what writes it, the oracle, and against the library, by every kernel."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.ops import base, bitlinear
from bitmodels.native_model import Sampler, Sampling
from support import INT8_KERNELS, TORCH_DTYPES, assert_same_bits, to_array
from write_test_vectors import FILE, hex_bits, made, text

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text())
LINEARS = VECTORS["linears"]
FUNCTIONS = {vector["name"]: vector for vector in VECTORS["functions"]}


def floats(bits: str) -> oracle.Floats:
    return np.array([int(word, 16) for word in bits.split()], np.uint32).view(np.float32)


def config_of(vector: dict[str, Any]) -> BitQuantConfig:
    granularities = vector["weight_granularity"], vector["activation_dtype"], vector["activation_granularity"]
    return BitQuantConfig(*granularities, vector.get("group_size", 128))


def bits_of(tensor: torch.Tensor) -> str:
    return hex_bits(to_array(tensor))


def test_the_file_is_what_the_oracle_computes() -> None:
    assert FILE.read_text() == text(), "scripts/write_test_vectors.py is due"


@pytest.mark.parametrize("vector", VECTORS["scales"], ids=lambda vector: str(vector["count"]))
def test_scales(vector: dict[str, Any]) -> None:
    weight = made(vector["count"], vector["step"]) * floats(vector["factor"])
    for shape in ((1, -1), (-1, 1)):
        scale = base.compute_weight_scale(torch.from_numpy(weight).view(shape), BitQuantConfig())
        assert bits_of(scale) == vector["scale"]


@pytest.mark.parametrize("vector", VECTORS["orders"], ids=lambda vector: vector["name"])
def test_orders(vector: dict[str, Any]) -> None:
    weight = torch.zeros(1, vector["count"])
    for index, bits in vector["values"]:
        weight[0, index] = float(floats(bits)[0])
    assert bits_of(base.compute_weight_scale(weight, BitQuantConfig())) == vector["scale"]
    assert oracle.ordered_sum(weight[0].double().numpy()) == float.fromhex(vector["sum"])


def test_orders_tell_a_wrong_order() -> None:
    """Plain summation gives another scale wherever ones meet before they meet the large number."""
    differ = 0
    for vector in VECTORS["orders"]:
        values = np.zeros(vector["count"], np.float64)
        for index, bits in vector["values"]:
            values[index] = floats(bits)[0]
        in_order = np.float32(sum(values.tolist()) / values.size)
        differ += hex_bits(in_order) != vector["scale"]
    assert differ == 5


@pytest.mark.parametrize("vector", LINEARS, ids=lambda vector: vector["name"])
def test_steps(vector: dict[str, Any]) -> None:
    config, k = config_of(vector), vector["in_features"]
    x, weight = (torch.from_numpy(floats(vector[name])).view(-1, k) for name in ("x", "weight"))
    s_w, s_x = base.compute_weight_scale(weight, config), base.compute_x_scale(x, config)
    assert bits_of(s_w) == vector["weight_scale"]
    assert bits_of(s_x) == vector["x_scale"]
    codes = base.quantize_weight(weight, s_w, config)
    assert codes.tolist() == vector["weight_codes"]
    assert base.quantize_x(x, s_x, config).tolist() == vector["x_codes"]
    for layout, packed in vector["packed"].items():
        assert bytes(base.pack_weights(codes, layout).flatten().tolist()).hex() == packed


@pytest.mark.parametrize("name", INT8_KERNELS)
@pytest.mark.parametrize("vector", LINEARS, ids=lambda vector: vector["name"])
def test_outputs_of_every_kernel(vector: dict[str, Any], name: str) -> None:
    config, k, n = config_of(vector), vector["in_features"], vector["out_features"]
    x = torch.from_numpy(floats(vector["x"])).view(-1, k)
    bias = None if vector["bias"] is None else torch.from_numpy(floats(vector["bias"]))
    scale = torch.from_numpy(floats(vector["weight_scale"]))
    if config.weight_granularity == "per_group":
        scale = scale.half().view(n, -1)
    with KernelRegistry.forced(name):
        for packed in vector["packed"].values():
            qweight = torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8).view(n, -1)
            y = bitlinear.forward(x, None, scale, qweight, bias, config)
            assert_same_bits(y, floats(vector["y"]["float32"]).reshape(-1, n), "float32")
            for dtype in ("bfloat16", "float16"):
                with torch.autocast("cpu", TORCH_DTYPES[dtype]):
                    y = bitlinear.forward(x, None, scale, qweight, bias, config)
                assert_same_bits(y, floats(vector["y"][dtype]).reshape(-1, n), dtype)


# --- functions of language models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "erf", "tanh"])
def test_functions_are_within_two_units_in_the_last_place(name: str) -> None:
    """But where exp is cut off."""
    for x, y in zip(floats(FUNCTIONS[name]["x"]), floats(FUNCTIONS[name]["y"]), strict=True):
        if name == "exp" and x < -87:
            assert y == 0
        elif name == "exp" and x > np.float32(88.72):
            assert y == np.inf
        elif np.isnan(x):
            assert np.isnan(y)
        else:
            truth = getattr(math, name)(float(x))
            assert abs(float(y) - truth) <= 2 * float(np.spacing(np.abs(y)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_ordinary_and_special_inputs(name: str) -> None:
    x, y = floats(FUNCTIONS[name]["x"]), floats(FUNCTIONS[name]["y"])
    assert len(x) == len(y)
    assert np.count_nonzero(np.isfinite(x)) >= 12
    assert {0.0, np.inf, -np.inf} < set(x[~np.isnan(x)].tolist())
    assert np.isnan(y[np.isnan(x)]).all()


@pytest.mark.parametrize("vector", VECTORS["rotations"], ids=lambda vector: vector["name"])
def test_rotations_are_turns(vector: dict[str, Any]) -> None:
    """Squares of cosine and sine add up to that of the scaling's factor; at position 0 there is only that."""
    shape = len(vector["positions"]), vector["head_dim"] // 2
    cosines, sines = (floats(vector[name]).astype(np.float64).reshape(shape) for name in ("cosines", "sines"))
    assert (cosines[0] == cosines[0, 0]).all()
    assert (sines[0] == 0).all()
    np.testing.assert_allclose(np.hypot(cosines, sines), cosines[0, 0], rtol=1e-7)
    assert (cosines[0, 0] == 1) == (vector["rope_parameters"]["rope_type"] in ("default", "linear", "llama3"))


def some_are_kept(x: np.float32, count: int, min_p: np.float32) -> bool:
    """Whether a sampler keeps `count` tokens of logit x beside one of logit 0, whose weight is 1."""
    logits = np.full(count + 1, x, np.float32)
    logits[0] = 0
    sampler = Sampler(Sampling(temperature=1.0, min_p=float(min_p), seed=3), count + 1)
    return any(sampler.sample(logits.copy()) != 0 for _ in range(12))


def test_exp_of_the_engine() -> None:
    """min_p compares with exp's result. Results above 1 and tiny ones do not show in what is drawn."""
    tried = 0
    for x, y in zip(floats(FUNCTIONS["exp"]["x"]), floats(FUNCTIONS["exp"]["y"]), strict=True):
        if not -9 < x < -1e-3:
            continue
        tried += 1
        count = math.ceil(4 / float(y))
        assert some_are_kept(x, count, y)
        assert not some_are_kept(x, count, np.nextafter(y, np.float32(1)))
    assert tried == 6
