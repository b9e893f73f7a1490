"""Every kernel against the oracle, bit for bit; TorchKernel's float32 activations within a bound from K."""

from __future__ import annotations

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
from oracle import Floats, Schema
from support import (
    SHAPES,
    Linear,
    assert_forward,
    assert_forward_bits,
    assert_same_bits,
    assert_within,
    config_of,
    covers,
    make_linear,
    proves,
    same_bits,
    to_array,
    to_tensor,
    torch_threads,
    train_forward,
)


def run_forced(name: str, case: Linear, schema: Schema) -> torch.Tensor:
    """Inference on freshly prepared weights by the kernel `name`, and proof that it ran."""
    return run_prepared(name, case, schema, *bitlinear.prepare_weights(case.weight, config_of(schema)))


def run_prepared(name: str, case: Linear, schema: Schema, scale: torch.Tensor, qweight: torch.Tensor) -> torch.Tensor:
    with KernelRegistry.forced(name), proves(name):
        return bitlinear.forward(case.x, None, scale, qweight, case.bias, config_of(schema))


def schemas_of(name: str) -> list[Schema]:
    return [schema for schema in oracle.SCHEMAS if covers(name, schema)]


def linear_of(x: Floats, weight: Floats, bias: Floats | None = None, dtype: str = "float32") -> Linear:
    return Linear(
        to_tensor(x, dtype), to_tensor(weight, dtype), None if bias is None else to_tensor(bias, dtype), dtype
    )


def check(name: str, case: Linear, schema: Schema) -> None:
    judge = assert_forward if name == "TorchKernel" else assert_forward_bits
    judge(run_forced(name, case, schema), *case.arrays, schema, case.dtype)


# --- fixed cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_shapes(kernel: str, m: int, n: int, k: int) -> None:
    schemas = schemas_of(kernel)
    for index, schema in enumerate(schemas):
        case = make_linear(m, n, k, bias=(m + index) % 2 == 0, seed=m + index)
        check(kernel, case, schema)


@pytest.mark.medium
def test_activations_beyond_a_cache(kernel: str) -> None:
    """5 MB of int8 activations, 20 MB of float32 ones: more than kernels pack at a time."""
    for schema in schemas_of(kernel)[::2]:
        check(kernel, make_linear(79, 3, 65_537, seed=27), schema)


def test_configs_and_dtypes(kernel: str, dtype: str) -> None:
    for schema in schemas_of(kernel):
        check(kernel, make_linear(14, 37, 83, dtype, seed=3), schema)
        check(kernel, make_linear(1, 37, 83, dtype, bias=False, seed=4), schema)


def test_by_name_is_the_same_as_forced(kernel: str) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(5, 18, 70, seed=5)
        bound = KernelRegistry.get_kernel_by_name(kernel, config_of(schema))
        assert bound.quant_config == config_of(schema)
        scale, qweight = bound.prepare_weights(case.weight, config_of(schema))
        with proves(kernel):
            y = bound(case.x, scale, qweight, case.bias)
        assert_forward(y, *case.arrays, schema, "float32")
        assert same_bits(y, bound(case.x, scale, qweight, bias=case.bias, quant_config=config_of(schema)))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 5), (1, 2, 1, 3)])
def test_leading_dimensions(kernel: str, leading: tuple[int, ...]) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(leading, 19, 33, seed=6)
        scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
        with KernelRegistry.forced(kernel):  # Which computes no tile where there are no rows.
            y = bitlinear.forward(case.x, None, scale, qweight, case.bias, config_of(schema))
        assert tuple(y.shape) == (*leading, 19)
        assert_forward(y, *case.arrays, schema, "float32")


def test_non_contiguous_arguments(kernel: str, dtype: str) -> None:
    for schema in schemas_of(kernel):
        case = make_linear((4, 3), 21, 35, dtype, seed=7)
        x = case.x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        weight = case.weight.t().contiguous().t()
        assert case.bias is not None
        bias = torch.stack([case.bias, case.bias], dim=1)[:, 0]
        assert not x.is_contiguous()
        assert not weight.is_contiguous()
        assert not bias.is_contiguous()
        check(kernel, Linear(x, weight, bias, dtype), schema)
        wide = torch.zeros(12, 50, dtype=case.x.dtype)
        wide[:, 5:40] = case.x.reshape(12, 35)
        check(kernel, Linear(wide[:, 5:40], case.weight, case.bias, dtype), schema)
        check(kernel, Linear(case.x[:1, 0].expand(5, 35), case.weight, None, dtype), schema)
        check(kernel, Linear(case.x[:1, 0, :1].expand(5, 35), case.weight, None, dtype), schema)


def values_cases(seed: int) -> dict[str, tuple[Floats, Floats, Floats | None]]:
    """x (13, 129), weight (34, 129), bias (34,) or None, of one kind of value each."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((13, 129)).astype(np.float32)
    weight = rng.standard_normal((34, 129)).astype(np.float32)
    bias = rng.standard_normal(34).astype(np.float32)
    signs = np.where(rng.random(x.shape) < 0.5, -1, 1).astype(np.float32)
    return {
        "all activations largest": (np.full_like(x, 3), np.ones_like(weight), None),
        "all activations smallest": (np.full_like(x, -3), np.ones_like(weight), bias),
        "all weights -1": (np.full_like(x, 3), -np.ones_like(weight), bias),
        "extreme of both signs": (3 * signs, np.sign(weight), None),
        "huge x": (x / np.abs(x).max() * np.float32(3e38), weight, bias),
        "huge weight": (x, weight / np.abs(weight).max() * np.float32(3e38), bias),
        "product of scales overflows": (x * np.float32(1e37), weight * np.float32(1e37), bias),
        "tiny x": (x * np.float32(1e-30), weight, bias),
        "tiny weight": (x, weight * np.float32(1e-30), bias),
        "tiny both": (x * np.float32(1e-20), weight * np.float32(1e-20), bias * np.float32(1e-38)),
        "denormal x": (x * np.float32(1e-40), weight, bias),
        "denormal weight": (x, weight * np.float32(1e-40), bias),
        "denormal bias": (x * 0, weight, bias * np.float32(1e-40)),
        "around the floor": (x * np.float32(1e-5), weight * np.float32(1e-5), bias),
        "zero x": (x * 0, weight, bias),
        "zero weight": (x, weight * 0, bias),
        "zero x and weight": (-x * 0, weight * 0, None),
        "one outlier": (np.where(np.arange(129) == 77, np.float32(1e30), x).astype(np.float32), weight, bias),
        "rows far apart": (x * np.exp2(np.arange(-60, 70, 10, dtype=np.float32))[:, None], weight, bias),
        "bias far above": (x, weight, bias * np.float32(1e20)),
        "ties of x": (np.where(np.arange(129) == 0, np.float32(63.5), np.round(x * 20) / 4), weight, bias),
    }


VALUES, OTHER_VALUES = values_cases(9), values_cases(10)
OVERFLOWING = ("huge x", "huge weight", "product of scales overflows")
"""Their partial sums may overflow in one order and not in another: no bound for TorchKernel's float32 activations."""
TOO_LARGE_FOR_GROUPS = ("huge weight", "product of scales overflows")
"""Means that float16 cannot hold."""


@pytest.mark.parametrize("values", VALUES)
def test_values(kernel: str, values: str) -> None:
    x, weight, bias = VALUES[values]
    for schema in schemas_of(kernel):
        if schema.weight_per_group and values in TOO_LARGE_FOR_GROUPS:
            continue
        if schema.is_int8 or kernel != "TorchKernel" or values not in OVERFLOWING:
            check(kernel, linear_of(x, weight, bias), schema)


@pytest.mark.parametrize("values", ["huge x", "tiny both", "rows far apart", "zero x", "extreme of both signs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_of_half_precision(int8_kernel: str, values: str, dtype: str) -> None:
    x, weight, bias = OTHER_VALUES[values]
    if dtype == "float16":
        x = np.clip(x, -60000, 60000)
    for schema in oracle.INT8_SCHEMAS:
        check(int8_kernel, linear_of(x, weight, bias, dtype), schema)


@pytest.mark.parametrize("k", [1, 2, 16, 17])
def test_zero_has_no_sign(int8_kernel: str, k: int) -> None:
    """An integer sum of 0 is +0, also where every product is a negative code times 0."""
    x = np.full((3, k), -2, np.float32)
    weight = np.concatenate([np.zeros((2, k)), np.ones((1, k)), -np.ones((1, k))]).astype(np.float32)
    for schema in oracle.INT8_SCHEMAS:
        for bias in (None, np.full(4, -0.0, np.float32)):
            check(int8_kernel, linear_of(x, weight, bias), schema)


def test_sums_that_are_no_float32(int8_kernel: str) -> None:
    """Sums above 2^24 are rounded once, half to even, when they become float32."""
    k = 140_001
    rng = np.random.default_rng(11)
    x = np.where(rng.random((2, k)) < 0.02, rng.uniform(-1, 1, (2, k)), 1).astype(np.float32)
    weight = np.where(rng.random((3, k)) < 0.001, -1, 1).astype(np.float32)
    schema = Schema("per_channel", "int8", "per_channel")
    case = linear_of(x, weight)
    s_x = oracle.x_scale(x, schema)
    codes = oracle.quantize_x(x, s_x, schema).astype(np.int64)
    sums = codes @ oracle.quantize_weight(weight, oracle.weight_scale(weight, schema), schema).astype(np.int64).T
    assert (np.abs(sums) > 2**24).all()
    assert (sums.astype(np.float32).astype(np.int64) != sums).any()
    check(int8_kernel, case, schema)


@pytest.mark.medium
@pytest.mark.parametrize("k", [528_415, 1_060_001])
@pytest.mark.parametrize("m", [1, 13])
def test_k_where_shifted_sums_overflow(int8_kernel: str, m: int, k: int) -> None:
    """A kernel that sums codes shifted by 6 bits overflows int32 near K = 528,000 unless it flushes."""
    signs = np.array([1, -1, 1], np.float32)[:, None]
    x = np.full((m, k), 5, np.float32)
    config = Schema("per_channel", "int8", "per_channel")
    y = run_forced(int8_kernel, linear_of(x, np.repeat(signs, k, axis=1)), config)
    s_x = oracle.absmax_scale(x[0])
    expected = np.float32(127 * k) * (s_x * np.float32(1)) * signs[:, 0]
    assert_same_bits(y, np.repeat(expected[None, :], m, axis=0).astype(np.float32), "float32")


@pytest.mark.medium
def test_largest_k(int8_kernel: str) -> None:
    k = 2**24 - 1
    x, weight = torch.full((1, 1), -2.0).expand(1, k), torch.ones(1, 1).expand(1, k)
    y = run_forced(int8_kernel, Linear(x, weight, None, "float32"), Schema())
    expected = np.float32(-127 * k) * (np.float32(2) / np.float32(127) * np.float32(1))
    assert_same_bits(y, np.array([[expected]], np.float32), "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 64, 80])
def test_x_that_is_not_finite(kernel: str, value: float, column: int) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(14, 19, 81, seed=12)
        case.x[5, column] = value
        y = to_array(run_forced(kernel, case, schema))
        spoils_all = schema.is_int8 and schema.activation_granularity == "per_tensor"
        nan_rows = np.asarray(np.isnan(y).all(axis=1))
        assert nan_rows[5]
        assert nan_rows.all() if spoils_all else not np.isnan(np.delete(y, 5, axis=0)).any()
        if not spoils_all:
            clean = make_linear(14, 19, 81, seed=12)
            expected = to_array(run_forced(kernel, clean, schema))
            keep = np.arange(14) != 5
            if schema.is_int8:
                assert (y[keep].view(np.uint32) == expected[keep].view(np.uint32)).all()
            assert_forward(torch.from_numpy(y[keep]), to_array(clean.x)[keep], *clean.arrays[1:], schema, "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bias_that_is_not_finite(kernel: str, value: float) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(3, 19, 81, seed=13)
        assert case.bias is not None
        case.bias[17] = value
        y = to_array(run_forced(kernel, case, schema))
        assert np.array_equal(y[:, 17], np.full(3, value, np.float32), equal_nan=True)
        assert np.isfinite(np.delete(y, 17, axis=1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_not_finite_in_training(kernel: str, value: float) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(3, 19, 81, seed=14)
        case.weight[7, 80] = value
        with KernelRegistry.forced(kernel):
            y = train_forward(case, schema)
        expected = oracle.forward(*case.arrays, Schema(schema.weight_granularity, "int8", "per_channel"), "float32")
        assert np.array_equal(np.isnan(to_array(y)), np.isnan(expected))


# --- threads, batches, other kernels --------------------------------------------------------------------------------


# Work for many threads: several million multiply-adds, in few rows and in many, in one column and in a thousand.
WIDE_SHAPES = [(1, 4100, 1025), (5, 900, 1300), (70, 530, 257), (3000, 33, 64), (13, 1, 500_001), (160, 275, 1100)]


@pytest.mark.medium
@pytest.mark.parametrize(("m", "n", "k"), WIDE_SHAPES)
def test_thread_count_changes_no_bit(kernel: str, m: int, n: int, k: int) -> None:
    for activation_dtype in ("int8", "float32"):
        schema = Schema("per_channel" if m % 2 else "per_tensor", activation_dtype, "per_channel")
        if not covers(kernel, schema):
            continue
        case, scales, outputs = make_linear(m, n, k, seed=15), [], []
        for threads in (1, 2, 5):
            with torch_threads(threads):
                scales.append(bitlinear.prepare_weights(case.weight, config_of(schema))[0])
                outputs.append(run_forced(kernel, case, schema))
        assert_forward(outputs[0], *case.arrays, schema, "float32")
        assert all(same_bits(scale, scales[0]) for scale in scales)
        assert all(same_bits(output, outputs[0]) for output in outputs)


def test_thread_count_changes_no_bit_of_one_scale_for_all(int8_kernel: str) -> None:
    """absmax of all of x is folded over the threads' parts, each of which holds the largest entry once."""
    case = make_linear(300, 40, 500, seed=26)
    expected = None
    for place in (0, 149, 150, 151, 299):
        case.x[place, 77] = 1000.0 + place
        for threads in (1, 2, 5):
            with torch_threads(threads):
                y = run_forced(int8_kernel, case, Schema())
            expected = y if threads == 1 else expected
            assert expected is not None
            assert same_bits(y, expected)
        assert_forward(y, *case.arrays, Schema(), "float32")


@pytest.mark.parametrize("k", [130, 1100])
def test_row_depends_on_itself_alone(kernel: str, k: int) -> None:
    """Alone, in batches of several sizes, at any place: the same bits (per_channel activations)."""
    for schema in schemas_of(kernel):
        if not schema.x_per_channel:
            continue
        case = make_linear(61, 45, k, seed=16)
        whole = run_forced(kernel, case, schema)
        for rows in ([0], [60], [17], [5, 4], list(range(11)), list(range(20, 32)), list(range(60, 20, -1))):
            part = run_forced(kernel, Linear(case.x[rows], case.weight, case.bias, "float32"), schema)
            assert same_bits(part, whole[rows]), f"{kernel}, {schema}, rows {rows}"


def test_plain_int8_qweight(kernel: str) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(5, 35, 100, seed=20)
        scale = torch.from_numpy(oracle.weight_scale(case.arrays[1], schema))
        codes = torch.from_numpy(oracle.quantize_weight(case.arrays[1], to_array(scale), schema))
        assert_forward(run_prepared(kernel, case, schema, scale, codes), *case.arrays, schema, "float32")


def test_qweight_that_is_not_contiguous(kernel: str) -> None:
    """Computed like its contiguous copy, or refused by name; never read as if it were contiguous."""
    for schema in schemas_of(kernel):
        case = make_linear(5, 35, 100, seed=25)
        config = config_of(schema)
        scale, qweight = bitlinear.prepare_weights(case.weight, config)
        codes = bitlinear.unpack_weights(qweight, 100)
        for form in (qweight, codes):
            strided = form.t().contiguous().t()
            assert not strided.is_contiguous()
            try:
                with KernelRegistry.forced(kernel):
                    y = bitlinear.forward(case.x, None, scale, strided, case.bias, config)
            except QuantizationError as error:
                assert "contiguous" in str(error)  # noqa: PT017 (either is right)
                continue
            assert_forward(y, *case.arrays, schema, "float32")


def test_shapes_of_scales(int8_kernel: str) -> None:
    """Per-tensor scales are any one-element tensor, per-channel ones (N,) or (N, 1), those of groups (N, groups)."""
    case = make_linear(5, 35, 100, seed=21)
    views: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        "per_tensor": [lambda s: s.reshape(()), lambda s: s.reshape(1), lambda s: s.reshape(1, 1)],
        "per_channel": [lambda s: s, lambda s: s.reshape(-1, 1)],
        "per_group": [lambda s: s, lambda s: s.t().contiguous().t()],
    }
    for schema in schemas_of(int8_kernel):
        scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
        for view in views[schema.weight_granularity]:
            y = run_prepared(int8_kernel, case, schema, view(scale), qweight)
            assert_forward(y, *case.arrays, schema, "float32")


# --- any case -------------------------------------------------------------------------------------------------------


@st.composite
def linears(draw: st.DrawFn) -> tuple[Linear, Schema]:
    """Sizes around the block sizes, magnitudes over the whole range of float32, zeros, repeated and extreme values."""
    m = draw(st.one_of(st.integers(1, 30), st.sampled_from([12, 13, 24, 25, 48])))
    n = draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 33, 64, 65])))
    k = draw(st.one_of(st.integers(1, 100), st.sampled_from([64, 128, 129, 512, 513, 1031])))
    dtype = draw(st.sampled_from(oracle.OUTPUT_DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = []
    for shape in ((m, k), (n, k), (n,)):
        values = rng.standard_normal(shape)
        kind = draw(st.sampled_from(["normal", "grid", "extreme", "sparse", "outlier"]))
        if kind == "grid":
            values = np.round(values * 4) / 2
        elif kind == "extreme":
            values = np.sign(values)
        elif kind == "sparse":
            values = np.where(rng.random(shape) < 0.9, 0, values)
        elif kind == "outlier":
            values.flat[rng.integers(values.size)] *= 1e6
        low, high = (-10, 3) if dtype == "float16" else (-42, 17)
        values = values * 10.0 ** draw(st.one_of(st.just(0), st.integers(low, high)))
        arrays.append(values.astype(np.float32))
    if dtype == "float16":
        arrays = [np.clip(array, -65504, 65504) for array in arrays]
    schema = draw(st.sampled_from(oracle.SCHEMAS))
    if schema.weight_per_group:
        arrays[1] = np.clip(arrays[1], -65504, 65504)  # float16 holds their means.
    bias = arrays[2] if draw(st.booleans()) else None
    return linear_of(arrays[0], arrays[1], bias, dtype), schema


@pytest.mark.medium
@given(linears())
def test_any_linear(case: tuple[Linear, Schema]) -> None:
    """Every kernel that runs here, on one drawn case."""
    linear, schema = case
    for name in KernelRegistry.list_available_kernels():
        if covers(name, schema):
            check(name, linear, schema)


def test_oracle_bound_is_not_vacuous(float32_kernel: str) -> None:
    """The bound of the float32 comparisons is far below the values of the row that it judges."""
    case = make_linear(5, 20, 300, seed=24)
    schema = Schema("per_channel", "float32", "per_channel")
    expected, bound = oracle.float32_forward_bounds(*case.arrays, schema, "float32")
    assert (bound < 1e-3 * np.abs(expected).max(axis=1, keepdims=True)).all()
    assert_within(run_forced(float32_kernel, case, schema), expected, bound, "float32")
