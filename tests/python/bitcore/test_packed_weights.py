"""Packed weights: the scale, summed in the fixed order; bytes, inverses and results of both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from bitcore import testing
from bitcore.exceptions import QuantizationError
from bitcore.operators import torch_ops
from bitcore.ops import base, bitlinear
from bitcore.ops.base import compute_weight_scale
from bitlayers import BitLinear
from core_helpers import PER_TOKEN, make_layer
from oracle import Schema, checksum
from support import (
    SHAPES,
    assert_same_bits,
    config_of,
    make_linear,
    to_array,
    to_bytes,
    torch_threads,
)

# --- preparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (1, 3, 4097), (1, 70, 65), (1, 5, 20_000), (1, 4097, 3)])
def test_prepared_bytes(m: int, n: int, k: int) -> None:
    """Scale and bytes of the packed weight: the oracle's."""
    for schema in oracle.INT8_SCHEMAS[::2]:
        weight = make_linear(m, n, k, seed=22).weight
        scale, qweight = bitlinear.prepare_weights(weight, config_of(schema))
        expected_scale = oracle.weight_scale(to_array(weight), schema)
        codes = oracle.quantize_weight(to_array(weight), expected_scale, schema)
        assert_same_bits(scale, expected_scale, schema.scale_dtype, "qweight_scale")
        assert np.array_equal(to_bytes(qweight), oracle.pack(codes))
        bitlinear.check_qweight(qweight, k)
    assert np.array_equal(oracle.unpack(to_bytes(qweight), k), codes)


@pytest.mark.medium
@pytest.mark.parametrize("n", [1, 3, 513])
@pytest.mark.parametrize("k", [4095, 4096, 4097, 8209])
def test_weight_scale_is_summed_in_the_fixed_order(n: int, k: int) -> None:
    """Magnitudes over forty binades, so that other orders of summation give other bits."""
    rng = np.random.default_rng([23, n, k])
    weight = (rng.standard_normal((n, k)) * np.exp2(rng.uniform(-40, 40, (n, k)))).astype(np.float32)
    for schema in oracle.INT8_SCHEMAS[::2]:
        if schema.weight_per_group:
            weight = np.clip(weight, -65504, 65504)
        for threads in (1, 2):
            with torch_threads(threads):
                scale, _ = bitlinear.prepare_weights(torch.from_numpy(weight), config_of(schema))
            assert_same_bits(scale, oracle.weight_scale(weight, schema), schema.scale_dtype, "qweight_scale")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("places", "survive"),
    [
        pytest.param([32, 48, 64], False, id="same lane: added one by one"),
        pytest.param([1, 17], True, id="one other lane: added to each other first"),
        pytest.param([33, 40], False, id="lanes 1 and 8 meet lane 0 apart"),
        pytest.param([4, 12], True, id="lane 12 is folded onto lane 4"),
        pytest.param([2, 3], False, id="lane 3 is not folded onto lane 2"),
        pytest.param([8, 4, 2, 1], False, id="every fold meets lane 0"),
        pytest.param([4096, 17 * 4096], True, id="blocks 1 and 17 share a lane"),
        pytest.param([16 * 4096, 32 * 4096], False, id="blocks 16 and 32 are added to block 0 one by one"),
        pytest.param([4096, 4096 + 8], True, id="one block is summed by itself"),
        pytest.param([4096 * 4096, 4096 * 4096 + 4096], True, id="block sums are cut into blocks, too"),
    ],
)
def test_order_of_summation(places: list[int], survive: bool) -> None:
    """Lane 0 begins with a float32 tie, 2^53 + 2^29; a 1 added to it is lost, a 2 decides the tie."""
    weight = torch.zeros(8192, 4096) if max(places) >= 2**24 else torch.zeros(64, 4096)
    flat = weight.view(-1)
    flat[0], flat[16] = 2.0**53, 2.0**29
    for place in places:
        flat[place] = 1.0
    scale = compute_weight_scale(weight, config_of(Schema()))
    expected = np.float32(2.0**53 + (2.0**30 if survive else 0)) / np.float32(flat.numel())
    assert_same_bits(scale, np.array(expected, np.float32), "float32", "scale")
    if flat.numel() < 2**24:
        assert_same_bits(scale, oracle.weight_scale(to_array(weight), Schema()), "float32", "scale")


# --- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {"2bit": (1, 16), "1.6bit": (2, 20)}
"""Number in the trailer, and values of k that a 32-bit word holds."""


def exists(layout: str, in_features: int) -> bool:
    return layout == "2bit" or -(-in_features // 20) < -(-in_features // 16)


def slow_pack(codes: Tensor, layout: str) -> Tensor:
    """docs/packed-format.md, a byte at a time."""
    (rows, cols), (number, step_size) = codes.shape, LAYOUTS[layout]
    worth, digits = (4, 4) if layout == "2bit" else (3, 5)
    padded = [[int(code) + 1 for code in row] + [1] * (-cols % step_size) for row in codes]
    payload = bytearray()
    for first in range(0, rows, 16):
        for step in range(0, len(padded[0]), step_size):
            for row in padded[first : first + 16]:
                for byte in range(4):
                    payload.append(sum(row[step + 4 * digit + byte] * worth**digit for digit in range(digits)))
    fields = ((1, 4), (number, 4), (rows, 8), (cols, 8), (checksum(bytes(payload)), 8))
    trailer = b"BITLABQW" + b"".join(value.to_bytes(size, "little") for value, size in fields)
    trailer = trailer.ljust(rows * -(-64 // rows), b"\0")
    return torch.from_numpy(np.frombuffer(bytes(payload) + trailer, np.uint8).copy()).view(rows, -1)


@given(out_features=st.integers(1, 40), in_features=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_bytes_are_the_documented_ones(out_features: int, in_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator).to(torch.int8)
    packed = {}
    for layout in filter(lambda name: exists(name, in_features), LAYOUTS):
        packed[layout] = base.pack_weights(codes, layout)
        assert torch.equal(packed[layout], slow_pack(codes, layout))
        assert torch.equal(packed[layout], torch_ops.pack_weights(codes, layout))
        assert torch.equal(base.unpack_weights(packed[layout], in_features), codes)
        assert torch.equal(torch_ops.unpack_weights(packed[layout], in_features), codes)
    for source in packed.values():
        for target, expected in packed.items():
            assert torch.equal(base.repack(source, in_features, target), expected)
    assert torch.equal(base.pack_weights(codes), packed["2bit"])


def test_a_layer_takes_either_layout() -> None:
    layer = BitLinear(100, 30, quant_config=PER_TOKEN).eval()
    x = torch.randn(7, 100)
    expected = layer(x)
    state = layer.deploy().state_dict()
    state["qweight"] = base.repack(state["qweight"], 100, "1.6bit")
    fresh = BitLinear(100, 30, quant_config=PER_TOKEN)
    fresh.load_state_dict(state)
    assert fresh.is_deployed
    assert torch.equal(fresh.qweight, state["qweight"])  # type: ignore[arg-type]
    testing.assert_same_bits(fresh(x), expected)
    inputs = x.clone().requires_grad_()
    fresh(inputs).sum().backward()
    again = x.clone().requires_grad_()
    layer(again).sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, again.grad)  # type: ignore[arg-type]


def test_a_layout_that_does_not_exist_for_a_width() -> None:
    for in_features in (1, 16, 21, 32, 48, 64):
        codes = torch.zeros(2, in_features, dtype=torch.int8)
        for pack in (base.pack_weights, torch_ops.pack_weights):
            with pytest.raises(QuantizationError, match=rf"1\.6bit.*{in_features} in_features"):
                pack(codes, "1.6bit")


def test_compiled_code_reads_both_layouts() -> None:
    layer = make_layer(3, out_features=20, in_features=90)
    forward = torch.compile(bitlinear.forward, fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS:
        scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN, layout=layout)
        y = forward(layer.x, qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
        expected = bitlinear.forward(layer.x, qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
        testing.assert_same_bits(y, expected, layout)
