"""No bytes of a packed weight crash anything: forward and the readers raise QuantizationError or return."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
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
        for read in (bitlinear.check_qweight, bitlinear.unpack_weights):
            with pytest.raises(QuantizationError):
                read(qweight, k)


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
    for read in (bitlinear.check_qweight, bitlinear.unpack_weights):
        try:
            read(torch.from_numpy(qweight), k)
        except QuantizationError:
            continue
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
