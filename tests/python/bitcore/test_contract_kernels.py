"""Every kernel against the oracle, bit for bit; TorchKernel's float32 activations within a bound from K."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear
from bitcore.ops.base import compute_weight_scale
from oracle import Floats, Schema
from support import (
    ALL_KERNELS,
    INT8_KERNELS,
    LACKING_KERNELS,
    NATIVE_KERNELS,
    Linear,
    assert_forward,
    assert_forward_bits,
    assert_same_bits,
    assert_within,
    config_of,
    covers,
    first_available,
    make_linear,
    proves,
    same_bits,
    to_array,
    to_bytes,
    to_codes,
    to_tensor,
    torch_threads,
)

BUILT_IN = {
    "Int8Avx512VbmiKernel",
    "Int8Avx512VnniKernel",
    "Int8AvxVnniKernel",
    "Int8Avx2Kernel",
    "Int8PortableKernel",
    "Float32Avx512Kernel",
    "Float32Avx2Kernel",
    "Float32PortableKernel",
    "ReferenceKernel",
}

# 16 rows are a tile of the packed weight, 16 or 20 k a step; kernels multiply 2 to 24 tokens together, packed weights
# whole or panels of 16 or 32 rows x 128, 256, 512 or 1,024 k: below, at and above each, and primes.
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


def run_forced(name: str, case: Linear, schema: Schema) -> torch.Tensor:
    """Inference on freshly prepared weights by the kernel `name`, and proof that it ran."""
    config = config_of(schema)
    scale, qweight = bitlinear.prepare_weights(case.weight, config)
    with KernelRegistry.forced(name), proves(name):
        return bitlinear.forward(
            x=case.x, qweight_scale=scale, qweight=qweight, bias=case.bias, quant_config=config, training=False
        )


def schemas_of(name: str) -> list[Schema]:
    return [schema for schema in oracle.SCHEMAS if covers(name, schema)]


def linear_of(x: Floats, weight: Floats, bias: Floats | None = None, dtype: str = "float32") -> Linear:
    return Linear(
        to_tensor(x, dtype), to_tensor(weight, dtype), None if bias is None else to_tensor(bias, dtype), dtype
    )


def check(name: str, case: Linear, schema: Schema) -> None:
    judge = assert_forward if name == "TorchKernel" else assert_forward_bits
    judge(run_forced(name, case, schema), *case.arrays, schema, case.dtype)


# --- what there is --------------------------------------------------------------------------------------------------


def test_built_in_kernels_are_listed() -> None:
    assert set(NATIVE_KERNELS) >= BUILT_IN
    available = KernelRegistry.list_available_kernels()
    assert {"Int8Kernel", "Float32Kernel", "ReferenceKernel", "TorchKernel"} <= set(available)
    assert len(available) == len(set(available))


def test_kernels_that_need_another_machine() -> None:
    """Skipped where there are any, so that the summary of every run names what it did not run."""
    if LACKING_KERNELS:
        pytest.skip(f"this CPU lacks what these need: {', '.join(LACKING_KERNELS)}")


def test_only_supported_kernels_are_available() -> None:
    entries = json.loads(torch.ops.bitcore.list_kernels())["kernels"]
    available = set(KernelRegistry.list_available_kernels())
    for entry in entries:
        assert (entry["name"] in available) == entry["supported"], entry


def test_best_kernel_is_the_first_that_fits(schema: Schema) -> None:
    names = [name for name in KernelRegistry.list_available_kernels() if name not in ("Int8Kernel", "Float32Kernel")]
    best = next(name for name in names if covers(name, schema))
    found = KernelRegistry.get_kernel_for_config(config_of(schema))
    assert found.name == best
    case = make_linear(3, 18, 40)
    scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, qweight_scale=scale, qweight=qweight, quant_config=config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, weight=case.weight, quant_config=config_of(schema), training=True)


@pytest.mark.parametrize(("alias", "dtype"), [("Int8Kernel", "int8"), ("Float32Kernel", "float32")])
def test_alias_names_the_best_of_its_family(alias: str, dtype: str) -> None:
    config = config_of(Schema(activation_dtype=dtype))
    assert KernelRegistry.get_kernel_by_name(alias, config).name in (alias, first_available(alias[: -len("Kernel")]))


@pytest.mark.parametrize(
    "name", [name for name in ALL_KERNELS if not all(covers(name, schema) for schema in oracle.SCHEMAS)]
)
def test_kernel_that_does_not_fit_is_refused(name: str) -> None:
    case = make_linear(2, 5, 7)
    for schema in oracle.SCHEMAS:
        if covers(name, schema):
            continue
        config = config_of(schema)
        scale, qweight = bitlinear.prepare_weights(case.weight, config)
        with pytest.raises(KernelNotFoundError, match=name):
            KernelRegistry.get_kernel_by_name(name, config)
        with pytest.raises(KernelNotFoundError), KernelRegistry.forced(name):
            bitlinear.forward(case.x, qweight_scale=scale, qweight=qweight, quant_config=config)


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
        with KernelRegistry.forced(kernel):
            y = bitlinear.forward(
                case.x, qweight_scale=scale, qweight=qweight, bias=case.bias, quant_config=config_of(schema)
            )
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


def test_expanded_x(int8_kernel: str) -> None:
    case = make_linear(1, 21, 35, seed=8)
    for schema in schemas_of(int8_kernel):
        check(int8_kernel, Linear(case.x.expand(5, 35), case.weight, None, "float32"), schema)
        check(int8_kernel, Linear(case.x[:, :1].expand(5, 35), case.weight, None, "float32"), schema)


def values_case(name: str, rng: np.random.Generator) -> tuple[Floats, Floats, Floats | None]:
    """x (13, 129), weight (34, 129), bias (34,) or None, of one kind of value."""
    x = rng.standard_normal((13, 129)).astype(np.float32)
    weight = rng.standard_normal((34, 129)).astype(np.float32)
    bias = rng.standard_normal(34).astype(np.float32)
    signs = np.where(rng.random(x.shape) < 0.5, -1, 1).astype(np.float32)
    cases: dict[str, tuple[Floats, Floats, Floats | None]] = {
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
    return cases[name]


VALUE_CASES = [
    "all activations largest",
    "all activations smallest",
    "all weights -1",
    "extreme of both signs",
    "huge x",
    "huge weight",
    "product of scales overflows",
    "tiny x",
    "tiny weight",
    "tiny both",
    "denormal x",
    "denormal weight",
    "denormal bias",
    "around the floor",
    "zero x",
    "zero weight",
    "zero x and weight",
    "one outlier",
    "rows far apart",
    "bias far above",
    "ties of x",
]
OVERFLOWING = ("huge x", "huge weight", "product of scales overflows")
"""Their partial sums may overflow in one order and not in another: no bound for TorchKernel's float32 activations."""


@pytest.mark.parametrize("values", VALUE_CASES)
def test_values(kernel: str, values: str) -> None:
    x, weight, bias = values_case(values, np.random.default_rng(9))
    for schema in schemas_of(kernel):
        if schema.is_int8 or kernel != "TorchKernel" or values not in OVERFLOWING:
            check(kernel, linear_of(x, weight, bias), schema)


@pytest.mark.parametrize("values", ["huge x", "tiny both", "rows far apart", "zero x", "extreme of both signs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_of_half_precision(int8_kernel: str, values: str, dtype: str) -> None:
    x, weight, bias = values_case(values, np.random.default_rng(10))
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
        spoils_all = schema.is_int8 and not schema.x_per_channel
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
            y = bitlinear.forward(
                case.x, weight=case.weight, bias=case.bias, quant_config=config_of(schema), training=True
            )
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


@pytest.mark.parametrize("dtype", oracle.OUTPUT_DTYPES)
def test_lossless_across_kernels(int8_schema: Schema, dtype: str) -> None:
    case = make_linear(29, 75, 333, dtype, seed=17)
    assert len(INT8_KERNELS) >= 4
    outputs = [run_forced(name, case, int8_schema) for name in INT8_KERNELS]
    assert all(same_bits(output, outputs[0]) for output in outputs)


def test_forward_from_many_threads(int8_kernel: str) -> None:
    config = config_of(Schema("per_channel", "int8", "per_channel"))
    cases = [make_linear(m, 700, 200, seed=18) for m in (1, 3, 17, 40)]
    scale, qweight = bitlinear.prepare_weights(cases[0].weight, config)
    bound = KernelRegistry.get_kernel_by_name(int8_kernel, config)
    expected = [bound(case.x, scale, qweight) for case in cases]
    wrong: list[str] = []

    def work(index: int) -> None:
        for turn in range(25):
            pick = (index + turn) % len(cases)
            if not same_bits(bound(cases[pick].x, scale, qweight), expected[pick]):
                wrong.append(f"thread {index}, turn {turn}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_forward_leaves_its_arguments_alone(kernel: str) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(13, 35, 100, seed=19)
        scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
        arguments = [case.x, scale, qweight, case.bias]
        copies = [None if tensor is None else tensor.clone() for tensor in arguments]
        with KernelRegistry.forced(kernel):
            bitlinear.forward(
                case.x, qweight_scale=scale, qweight=qweight, bias=case.bias, quant_config=config_of(schema)
            )
        for tensor, copy in zip(arguments, copies, strict=True):
            assert tensor is copy is None or (tensor is not None and copy is not None and torch.equal(tensor, copy))


def test_plain_int8_qweight(kernel: str) -> None:
    for schema in schemas_of(kernel):
        case = make_linear(5, 35, 100, seed=20)
        scale = torch.from_numpy(oracle.weight_scale(case.arrays[1], schema))
        codes = torch.from_numpy(oracle.quantize_weight(case.arrays[1], to_array(scale), schema))
        with KernelRegistry.forced(kernel), proves(kernel):
            y = bitlinear.forward(
                case.x, qweight_scale=scale, qweight=codes, bias=case.bias, quant_config=config_of(schema)
            )
        assert_forward(y, *case.arrays, schema, "float32")


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
            with KernelRegistry.forced(kernel):
                try:
                    y = bitlinear.forward(
                        case.x, qweight_scale=scale, qweight=strided, bias=case.bias, quant_config=config
                    )
                except QuantizationError as error:
                    if "contiguous" not in str(error):
                        raise
                    continue
            assert_forward(y, *case.arrays, schema, "float32")


def test_shapes_of_scales(int8_kernel: str) -> None:
    """Per-tensor scales are any one-element tensor, per-channel ones (N,) or (N, 1)."""
    case = make_linear(5, 35, 100, seed=21)
    views: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        "per_tensor": [lambda s: s.reshape(()), lambda s: s.reshape(1), lambda s: s.reshape(1, 1)],
        "per_channel": [lambda s: s, lambda s: s.reshape(-1, 1)],
    }
    for schema in schemas_of(int8_kernel):
        scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
        for view in views[schema.weight_granularity]:
            with KernelRegistry.forced(int8_kernel):
                y = bitlinear.forward(
                    case.x, qweight_scale=view(scale), qweight=qweight, bias=case.bias, quant_config=config_of(schema)
                )
            assert_forward(y, *case.arrays, schema, "float32")


# --- preparing ------------------------------------------------------------------------------------------------------


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


@given(st.integers(1, 80), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_any_codes_pack_and_unpack(n: int, k: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    packed = bitlinear.pack_weights(torch.from_numpy(codes))
    assert np.array_equal(to_bytes(packed), oracle.pack(codes))
    assert np.array_equal(to_codes(bitlinear.unpack_weights(packed, k)), codes)


def test_oracle_bound_is_not_vacuous(float32_kernel: str) -> None:
    """The bound of the float32 comparisons is far below the values of the row that it judges."""
    case = make_linear(5, 20, 300, seed=24)
    schema = Schema("per_channel", "float32", "per_channel")
    expected, bound = oracle.float32_forward_bounds(*case.arrays, schema, "float32")
    assert (bound < 1e-3 * np.abs(expected).max(axis=1, keepdims=True)).all()
    assert_within(run_forced(float32_kernel, case, schema), expected, bound, "float32")
