"""prepare_weights: the oracle's scale, summed in the fixed order, and bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from bitcore.ops import bitlinear
from bitcore.ops.base import compute_weight_scale
from oracle import Schema
from support import (
    assert_same_bits,
    config_of,
    make_linear,
    to_array,
    to_bytes,
    to_codes,
    torch_threads,
)

SHAPES = [
    (1, 1, 1),
    (2, 1, 3),
    (1, 16, 16),
    (1, 17, 15),
    (3, 15, 17),
    (5, 31, 31),
    (7, 33, 33),
    (11, 32, 63),
    (12, 64, 64),
    (13, 65, 65),
    (1, 53, 127),
    (23, 16, 129),
    (24, 47, 255),
    (25, 48, 257),
    (1, 97, 511),
    (2, 96, 512),
    (4, 63, 513),
    (36, 34, 1023),
    (1, 33, 1024),
    (13, 40, 1025),
    (37, 7, 2049),
    (131, 19, 61),
]


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (1, 3, 4097), (1, 70, 65), (1, 5, 20_000), (1, 4097, 3)])
def test_prepared_bytes(m: int, n: int, k: int) -> None:
    """Scale and bytes of the packed weight, and back: the oracle's."""
    for schema in oracle.INT8_SCHEMAS[::2]:
        weight = make_linear(m, n, k, seed=22).weight
        scale, qweight = bitlinear.prepare_weights(weight, config_of(schema))
        expected_scale = oracle.weight_scale(to_array(weight), schema)
        codes = oracle.quantize_weight(to_array(weight), expected_scale, schema)
        assert_same_bits(scale, expected_scale, "float32", "qweight_scale")
        assert np.array_equal(to_bytes(qweight), oracle.pack(codes))
        assert np.array_equal(to_codes(bitlinear.unpack_weights(qweight, k)), codes)
        assert torch.equal(bitlinear.pack_weights(torch.from_numpy(codes)), qweight)
        assert torch.equal(bitlinear.repack(qweight, k, "2bit"), qweight)
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
        for threads in (1, 2):
            with torch_threads(threads):
                scale, _ = bitlinear.prepare_weights(torch.from_numpy(weight), config_of(schema))
            assert_same_bits(scale, oracle.weight_scale(weight, schema), "float32", "qweight_scale")


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
