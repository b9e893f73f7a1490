"""What the tests share: tensors to NumPy and back, comparisons, kernels, threads, seeded data."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import oracle
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear
from oracle import Bytes, Codes, Floats, Schema

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "core-api.md"

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --- tensors and arrays ---------------------------------------------------------------------------------------------


def to_array(tensor: torch.Tensor) -> Floats:
    """The float32 of every value, bfloat16 widened by its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return oracle.bfloat16_bits_to_float32(tensor.view(torch.int16).numpy().view(np.uint16))
    assert tensor.dtype in (torch.float32, torch.float16), tensor.dtype
    return tensor.numpy().astype(np.float32)


def to_codes(tensor: torch.Tensor) -> Codes:
    assert tensor.dtype == torch.int8, tensor.dtype
    return tensor.cpu().numpy()


def to_bytes(tensor: torch.Tensor) -> Bytes:
    assert tensor.dtype == torch.uint8, tensor.dtype
    return tensor.cpu().numpy()


def to_tensor(values: Floats, dtype: str = "float32") -> torch.Tensor:
    """A tensor of `dtype` that holds `values` rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "bfloat16":
        bits = oracle.float32_to_bfloat16_bits(values)
        return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return torch.from_numpy(values.astype(np.float16))
    return torch.from_numpy(values.copy())


def config_of(schema: Schema) -> BitQuantConfig:
    return BitQuantConfig(**cast(Any, schema.kwargs()))


# --- comparisons ----------------------------------------------------------------------------------------------------


def assert_same_bits(actual: torch.Tensor, expected: oracle.AnyFloats, dtype: str, what: str = "output") -> None:
    """Same type, shape and bits; any NaN equals any NaN."""
    assert isinstance(actual, torch.Tensor)
    assert actual.dtype == TORCH_DTYPES[dtype], f"{what} is {actual.dtype}, expected {dtype}"
    assert tuple(actual.shape) == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {expected.shape}"
    found = to_array(actual)
    expected = np.ascontiguousarray(expected, np.float32)
    differs = (found.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(found) & np.isnan(expected))
    if differs.any():
        where = tuple(int(i) for i in np.argwhere(differs)[0])
        pytest.fail(
            f"{what} differs in {int(differs.sum())} of {differs.size}, first at {where}: "
            f"{found[where]!r}, expected {expected[where]!r}"
        )


def assert_within(actual: torch.Tensor, expected: oracle.Doubles, bound: oracle.Doubles, dtype: str) -> None:
    """Every element within its bound; NaN exactly where expected; values beyond the dtype may be infinite."""
    assert actual.dtype == TORCH_DTYPES[dtype], f"output is {actual.dtype}, expected {dtype}"
    assert tuple(actual.shape) == expected.shape
    found = to_array(actual).astype(np.float64)
    largest = float(torch.finfo(TORCH_DTYPES[dtype]).max)
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all(), "NaN at other places than expected"
    overflown = np.isinf(found) & (np.sign(found) == np.sign(expected)) & (np.abs(expected) + bound >= largest)
    with np.errstate(invalid="ignore"):
        bad = ~nan & ~overflown & ~(np.abs(found - expected) <= bound)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        pytest.fail(
            f"{int(bad.sum())} of {bad.size} beyond the bound, first at {where}: {found[where]!r}, "
            f"expected {expected[where]!r} +- {bound[where]!r}"
        )


_answers: dict[object, Any] = {}


def _answer(function: Callable[..., Any], x: Floats, weight: Floats, bias: Floats | None, *rest: Any) -> Any:
    """What the oracle, which is slow, says; once for all kernels that are asked the same."""
    arrays = [x, weight] if bias is None else [x, weight, bias]
    digests = tuple((array.shape, hashlib.blake2b(array.tobytes()).digest()) for array in arrays)
    key = function, digests, rest
    if key not in _answers:
        _answers[key] = function(x, weight, bias, *rest)
    return _answers[key]


def assert_forward(
    actual: torch.Tensor, x: Floats, weight: Floats, bias: Floats | None, schema: Schema, dtype: str
) -> None:
    """`actual` is what the contract says of the widened arguments: bits for int8, a bound from K for float32."""
    if schema.is_int8:
        assert_same_bits(actual, _answer(oracle.forward, x, weight, bias, schema, dtype), dtype)
    else:
        expected, bound = _answer(oracle.float32_forward_bounds, x, weight, bias, schema, dtype)
        assert_within(actual, expected, bound, dtype)


def assert_forward_bits(
    actual: torch.Tensor, x: Floats, weight: Floats, bias: Floats | None, schema: Schema, dtype: str
) -> None:
    """As assert_forward, of a CPU kernel: with float32 activations, too, the bits."""
    forward = oracle.forward if schema.is_int8 else oracle.float32_forward
    assert_same_bits(actual, _answer(forward, x, weight, bias, schema, dtype), dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = to_array(a), to_array(b)
    return bool(((left.view(np.uint32) == right.view(np.uint32)) | (np.isnan(left) & np.isnan(right))).all())


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Linear:
    """The arguments of one linear, as tensors of `dtype` and as the float32 arrays that they widen to."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: str

    @property
    def arrays(self) -> tuple[Floats, Floats, Floats | None]:
        return to_array(self.x), to_array(self.weight), None if self.bias is None else to_array(self.bias)


def make_linear(
    m: int | tuple[int, ...], n: int, k: int, dtype: str = "float32", *, bias: bool = True, seed: int = 0
) -> Linear:
    """Normal x and weight whose rows have magnitudes of their own; `m` may be any leading shape."""
    rng = np.random.default_rng([seed, n, k])
    leading = (m,) if isinstance(m, int) else m
    x = rng.standard_normal((*leading, k)) * np.exp(rng.standard_normal((*leading, 1)))
    weight = rng.standard_normal((n, k)) * 0.05 * np.exp(0.5 * rng.standard_normal((n, 1)))
    shift = to_tensor(rng.standard_normal(n).astype(np.float32), dtype) if bias else None
    return Linear(to_tensor(x.astype(np.float32), dtype), to_tensor(weight.astype(np.float32), dtype), shift, dtype)


# 16 rows are a tile of the packed weight, 16 or 20 k a step; kernels multiply 2 to 24 tokens together, packed weights
# whole or panels of 16 or 32 rows x 128, 256, 512 or 1,024 k: below, at and above each, and primes.
# fmt: off
SHAPES = [
    (1, 1, 1), (2, 1, 3), (1, 16, 16), (1, 17, 15), (3, 15, 17), (5, 31, 31), (7, 33, 33), (11, 32, 63), (12, 64, 64),
    (13, 65, 65), (1, 53, 127), (23, 16, 129), (24, 47, 255), (25, 48, 257), (1, 97, 511), (2, 96, 512), (4, 63, 513),
    (36, 34, 1023), (1, 33, 1024), (13, 40, 1025), (37, 7, 2049), (131, 19, 61),
]
# fmt: on
"""(m, n, k)."""


# --- calls of the layer ----------------------------------------------------------------------------------------------


def train_forward(case: Linear, schema: Schema) -> torch.Tensor:
    return bitlinear.forward(
        x=case.x, weight=case.weight, bias=case.bias, quant_config=config_of(schema), training=True
    )


def infer_forward(case: Linear, schema: Schema) -> torch.Tensor:
    scale, qweight = bitlinear.prepare_weights(case.weight.detach(), config_of(schema))
    return bitlinear.forward(
        x=case.x, qweight_scale=scale, qweight=qweight, bias=case.bias, quant_config=config_of(schema)
    )


def require_grad(case: Linear) -> list[torch.Tensor]:
    """x, weight and, where there is one, bias, now leaves that collect gradients."""
    return [tensor.requires_grad_() for tensor in (case.x, case.weight, case.bias) if tensor is not None]


def largest_error(found: torch.Tensor, expected: torch.Tensor | oracle.Doubles) -> float:
    """Largest difference over the largest entry."""
    want = expected.detach().double().numpy() if isinstance(expected, torch.Tensor) else expected
    largest = np.abs(want).max(initial=0.0)
    return float(np.abs(found.detach().double().numpy() - want).max(initial=0.0) / (largest or 1.0))


# --- threads and kernels --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


NATIVE_KERNELS = [str(entry["name"]) for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"]]
"""Every built-in kernel of the engine, whether this CPU can run it or not, best first."""

ALIASES = ["Int8Kernel", "Float32Kernel"]
AVAILABLE_KERNELS = KernelRegistry.list_available_kernels()
ALL_KERNELS = [name for name in AVAILABLE_KERNELS if name not in ALIASES] + ALIASES
"""Every kernel that this machine runs. Tests walk over these; one test is skipped and names the others."""

LACKING_KERNELS = [name for name in NATIVE_KERNELS if name not in AVAILABLE_KERNELS]


def covers(kernel: str, schema: Schema) -> bool:
    """By the naming rule: a kernel's name begins with the activation dtype that it computes, else it covers both."""
    if kernel.startswith("Int8"):
        return schema.is_int8
    return not (kernel.startswith("Float32") and schema.is_int8)


INT8_KERNELS = [name for name in ALL_KERNELS if covers(name, Schema(activation_dtype="int8"))]
FLOAT32_KERNELS = [name for name in ALL_KERNELS if covers(name, Schema(activation_dtype="float32"))]


def tile_calls() -> dict[str, int]:
    """Tiles that each native kernel has computed since the process began."""
    return {name: int(torch.ops.bitcore.kernel_tile_calls(name)) for name in NATIVE_KERNELS if name not in ALIASES}


@contextlib.contextmanager
def proves(kernel: str) -> Iterator[None]:
    """Checks that in its block `kernel` computed tiles and no other did."""
    expected = {"Int8Kernel": first_available("Int8"), "Float32Kernel": first_available("Float32")}.get(kernel, kernel)
    before = tile_calls()
    yield
    ran = {name for name, calls in tile_calls().items() if calls != before[name]}
    wanted = {expected} if expected in before else set()
    assert ran == wanted, f"kernels that ran: {sorted(ran)}, expected {sorted(wanted)}"


def first_available(prefix: str) -> str:
    """The best kernel of a family on this machine."""
    return next(name for name in AVAILABLE_KERNELS if name.startswith(prefix) and name not in ALIASES)
