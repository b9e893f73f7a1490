"""Damaged packed weights: every changed byte is found by the readers; whatever the bytes, forward raises or computes.

No bytes crash anything: forward and the readers raise QuantizationError or return.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from bad_tensors import expect
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.operators import torch_ops
from bitcore.ops import bitlinear
from oracle import Bytes, Schema
from support import assert_forward, assert_same_bits, config_of, covers, make_linear


def attempt(qweight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, schema: Schema) -> torch.Tensor | None:
    """y, or None where the call refuses the bytes; any other exception fails the test."""
    try:
        return bitlinear.forward(x, qweight_scale=scale, qweight=qweight, quant_config=config_of(schema))
    except QuantizationError:
        return None


def schema_for(kernel: str) -> Schema:
    return Schema("per_tensor", "int8" if covers(kernel, Schema()) else "float32", "per_channel")


# --- changed bytes --------------------------------------------------------------------------------------------------

CHECKSUM = 32  # Its offset in the trailer; forward reads neither it nor the zeros behind it.
TRAILER = {"magic": (0, 8), "version": (8, 12), "layout": (12, 16), "out_features": (16, 24), "in_features": (24, 32)}
CHECKS: list[Callable[[torch.Tensor, int], Any]] = [
    bitlinear.check_qweight,
    bitlinear.unpack_weights,
    lambda qweight, k: bitlinear.repack(qweight, k, "2bit"),
    torch_ops.check_qweight,
]
"""What reads every byte."""


def refuse(qweight: torch.Tensor, k: int, words: str = "qweight") -> None:
    for check in CHECKS:
        expect(QuantizationError, words, partial(check, qweight, k))


def with_right_checksum(qweight: torch.Tensor, payload: int) -> torch.Tensor:
    total = oracle.checksum(qweight.view(-1)[:payload].numpy().tobytes())
    qweight.view(-1)[payload + 32 : payload + 40] = torch.tensor(list(total.to_bytes(8, "little")), dtype=torch.uint8)
    return qweight


@pytest.mark.parametrize(("layout", "n", "k"), [("2bit", 2, 3), ("2bit", 5, 19), ("1.6bit", 5, 19), ("1.6bit", 2, 40)])
def test_every_changed_byte(layout: str, n: int, k: int) -> None:
    """The readers refuse it; forward, which gets one unit vector per row of x, refuses it or reads ternary weights."""
    rng = np.random.default_rng([92, n, k])
    codes = torch.from_numpy(rng.integers(-1, 2, (n, k)).astype(np.int8))
    whole = bitlinear.pack_weights(codes, layout=layout)
    unit, scale, schema = torch.eye(k), torch.tensor(1.0), Schema("per_tensor", "int8", "per_channel")
    payload = whole.numel() - n * -(-64 // n)
    outcomes = {"refused": 0, "read": 0}
    for i in range(whole.numel()):
        for change in (*(1 << bit for bit in range(8)), int(rng.integers(1, 256)), 0xFF):
            damaged = whole.clone()
            damaged.view(-1)[i] ^= change
            refuse(damaged, k)
            y = attempt(damaged, unit, scale, schema)
            seen = None if y is None else y.round().T
            outcomes["refused" if seen is None else "read"] += 1
            if i >= payload:
                assert (seen is not None) == (i >= payload + CHECKSUM)
                assert seen is None or torch.equal(seen, codes.float())
            elif seen is not None:
                assert torch.isin(seen, torch.tensor([-1.0, 0.0, 1.0])).all()
                # All codes but those of one byte are the same.
                assert (seen != codes).sum() <= 5
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("magic", int.from_bytes(b"BITLABQX", "little"), ""),
        ("version", 2, "2 1"),
        ("layout", 9, "9"),
        ("out_features", 20, "20 19"),
        ("in_features", 38, "38 37"),
    ],
)
def test_trailer_errors_name_the_values(kernel: str, field: str, value: int, words: str) -> None:
    n, k = 19, 37
    first, last = TRAILER[field]
    qweight = bitlinear.pack_weights(torch.ones(n, k, dtype=torch.int8))
    start = n * oracle.packed_columns(n, k)[0] + first
    stored = value.to_bytes(last - first, "little")
    qweight.view(-1)[start : start + len(stored)] = torch.tensor(list(stored), dtype=torch.uint8)
    expect(QuantizationError, f"qweight {words}", partial(bitlinear.check_qweight, qweight, k))
    with KernelRegistry.forced(kernel):
        assert attempt(qweight, torch.ones(2, k), torch.tensor(1.0), schema_for(kernel)) is None


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 16, 64), (1, 33, 500), (13, 33, 500), (40, 17, 1030)])
def test_invalid_code_anywhere(kernel: str, m: int, n: int, k: int) -> None:
    """One code 3 at the ends, in the padding and in between is seen by one row of x and by many."""
    schema = schema_for(kernel)
    case = make_linear(m, n, k, seed=83)
    scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
    payload = n * oracle.packed_columns(n, k)[0]
    for offset in sorted({0, payload // 3, payload // 2, payload - 1}):
        for field in range(4):
            broken = qweight.clone()
            broken.view(-1)[offset] |= 3 << (2 * field)
            with KernelRegistry.forced(kernel), pytest.raises(QuantizationError, match="qweight"):
                bitlinear.forward(case.x, qweight_scale=scale, qweight=broken, quant_config=config_of(schema))
    with KernelRegistry.forced(kernel):
        assert attempt(qweight, case.x, scale, schema) is not None


@pytest.mark.medium
def test_every_byte_above_242_is_refused() -> None:
    codes, schema = torch.zeros(1, 80, dtype=torch.int8), Schema("per_tensor", "int8", "per_channel")
    for place in range(16):
        for byte in range(256):
            packed = bitlinear.pack_weights(codes, "1.6bit")
            packed[0, place] = byte
            with_right_checksum(packed, 16)
            assert (attempt(packed, torch.ones(1, 80), torch.tensor(1.0), schema) is None) == (byte > 242)
            for check in CHECKS:
                if byte > 242:
                    expect(QuantizationError, "invalid code", partial(check, packed, 80))
                else:
                    check(packed, 80)


def test_the_size_and_the_trailer_have_to_name_the_same_layout() -> None:
    packed = bitlinear.pack_weights(torch.zeros(2, 80, dtype=torch.int8), "1.6bit")
    packed.view(-1)[2 * 16 + 12] = 1
    refuse(packed, 80)


@pytest.mark.parametrize(("layout", "values_of_a_word"), [("2bit", 16), ("1.6bit", 20)])
def test_padding_that_is_no_zero_is_damage(layout: str, values_of_a_word: int) -> None:
    packed = bitlinear.pack_weights(torch.ones(2, 90, dtype=torch.int8), layout)
    payload = 2 * 4 * -(-90 // values_of_a_word)
    packed.view(-1)[payload - 1] = 0  # The last byte holds the last value of k.
    refuse(with_right_checksum(packed, payload), 90, "qweight padding")


# --- any bytes ------------------------------------------------------------------------------------------------------


def random_payload(n: int, k: int, rng: np.random.Generator, *, valid: bool) -> Bytes:
    """Random payload under a trailer that is right in all but its checksum; `valid`: no field is 3."""
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    packed = oracle.pack(codes)
    if not valid:
        payload = n * oracle.packed_columns(n, k)[0]
        packed.reshape(-1)[:payload] = rng.integers(0, 256, payload, dtype=np.uint8)
    return packed


SHAPES = [(1, 1, 1), (1, 7, 50), (1, 64, 512), (2, 33, 130), (13, 16, 64), (40, 35, 1025)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_random_payload(kernel: str, m: int, n: int, k: int) -> None:
    """Every payload whose fields are all below 3 is computed as the bytes say, every other one refused."""
    rng = np.random.default_rng([90, m, n, k])
    schema = schema_for(kernel)
    x, scale = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)), torch.tensor(0.5)
    for valid in (True, False, False):
        qweight = random_payload(n, k, rng, valid=valid)
        fields = oracle.unpack_fields(qweight, k)
        with KernelRegistry.forced(kernel):
            y = attempt(torch.from_numpy(qweight), x, scale, schema)
        assert (y is None) == bool((fields == 3).any())
        if y is not None and schema.is_int8:
            expected = oracle.forward_codes(
                x.numpy(), oracle.unpack(qweight, k), scale.numpy(), None, schema, "float32"
            )
            assert_same_bits(y, expected, "float32")
        elif y is not None:
            codes = torch.from_numpy(oracle.unpack(qweight, k)).float()
            assert torch.allclose(y, x @ codes.t() * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_random_bytes(kernel: str, m: int, n: int, k: int) -> None:
    """Without the magic nothing is computed."""
    rng = np.random.default_rng([91, m, n, k])
    schema = schema_for(kernel)
    columns = sum(oracle.packed_columns(n, k))
    for _ in range(5):
        qweight = torch.from_numpy(rng.integers(0, 256, (n, columns), dtype=np.uint8))
        with KernelRegistry.forced(kernel):
            assert attempt(qweight, torch.ones(m, k), torch.tensor(1.0), schema) is None
        refuse(qweight, k)


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 140),
    m=st.integers(0, 14),
    columns=st.one_of(st.none(), st.integers(0, 200)),
    trailer=st.sampled_from(["right", "random", "of other sizes", "moved"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bytes_of_any_shape(n: int, k: int, m: int, columns: int | None, trailer: str, seed: int) -> None:
    """Any shape and bytes with a trailer that is right, wrong, of another weight or in another place."""
    rng = np.random.default_rng(seed)
    right = sum(oracle.packed_columns(n, k))
    qweight = rng.integers(0, 256, (n, right if columns is None else columns), dtype=np.uint8)
    flat = qweight.reshape(-1)
    stored = oracle.pack(rng.integers(-1, 2, (n, k)).astype(np.int8)).reshape(-1)
    if trailer == "of other sizes":
        other_n, other_k = int(rng.integers(1, 2**40)), int(rng.integers(1, 2**40))
        payload = n * oracle.packed_columns(n, k)[0]
        stored[payload + 16 : payload + 32] = np.frombuffer(
            other_n.to_bytes(8, "little") + other_k.to_bytes(8, "little"), np.uint8
        )
    if trailer != "random" and flat.size:
        length = min(flat.size, n * oracle.packed_columns(n, k)[1])
        shift = int(rng.integers(0, 9)) if trailer == "moved" else 0
        end = flat.size - min(shift, flat.size - length)
        flat[end - length : end] = stored[len(stored) - length :]
    before = qweight.copy()
    for dtype in ("int8", "float32"):
        schema = Schema("per_tensor", dtype, "per_channel")
        for name in KernelRegistry.list_available_kernels():
            if covers(name, schema):
                with KernelRegistry.forced(name):
                    attempt(torch.from_numpy(qweight), torch.ones(m, k), torch.tensor(1.0), schema)
    for check in CHECKS:
        with contextlib.suppress(QuantizationError):
            check(torch.from_numpy(qweight), k)
    assert np.array_equal(qweight, before)


# --- reading at the end of memory -----------------------------------------------------------------------------------


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to where its last byte is followed by a page that nobody may read."""
    if sys.platform != "linux":
        pytest.skip("page protection is asked for in Linux's way")
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        length = tensor.numel() * tensor.element_size()
        size = oracle.ceil_div(length, mmap.PAGESIZE) * mmap.PAGESIZE
        region = mmap.mmap(-1, size + mmap.PAGESIZE)  # Freed with the tensor that is made of it.
        guard = ctypes.addressof(ctypes.c_char.from_buffer(region)) + size
        found = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=size - length)
        found.copy_(tensor.flatten())
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        return found.view(tensor.shape)

    return copy


END_SHAPES = [(1, 1, 1), (1, 7, 50), (13, 16, 64), (2, 33, 500), (12, 64, 512), (5, 18, 37)]


@pytest.mark.parametrize(("m", "n", "k"), END_SHAPES)
@pytest.mark.parametrize("dtype", oracle.OUTPUT_DTYPES)
def test_nothing_is_read_past_the_end(
    kernel: str, m: int, n: int, k: int, dtype: str, guarded: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """x, weight, bias, scale and qweight each end where their memory ends."""
    for schema in oracle.SCHEMAS[::3]:
        if not covers(kernel, schema):
            continue
        config, case = config_of(schema), make_linear(m, n, k, dtype, seed=93)
        assert case.bias is not None
        x, weight, bias = guarded(case.x), guarded(case.weight), guarded(case.bias)
        scale, qweight = bitlinear.prepare_weights(weight, config)
        codes = bitlinear.unpack_weights(guarded(qweight), k)
        assert torch.equal(bitlinear.pack_weights(guarded(codes)), qweight)
        bitlinear.check_qweight(guarded(qweight), k)
        with KernelRegistry.forced(kernel):
            for form in (qweight, codes):
                y = bitlinear.forward(
                    x, qweight_scale=guarded(scale), qweight=guarded(form), bias=bias, quant_config=config
                )
                assert_forward(y, *case.arrays, schema, dtype)
            y = bitlinear.forward(x, weight=weight, bias=bias, quant_config=config, training=True)
            assert_forward(y, *case.arrays, schema, dtype)
