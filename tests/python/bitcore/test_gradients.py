"""The straight-through gradients: against the oracle, and the operator that computes them against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import support
from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.operators import native, torch_ops
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear
from core_helpers import CONFIGS, DTYPES, PER_TOKEN, id_of, make_layer
from oracle import Schema
from support import (
    TORCH_DTYPES,
    Linear,
    config_of,
    covers,
    infer_forward,
    largest_error,
    make_linear,
    require_grad,
    to_array,
    to_tensor,
    train_forward,
)

LEADING = ((), (2, 3), (0,), (2, 0))


# --- of the layer -----------------------------------------------------------------------------------------------------


def random_dy(*shape: int, dtype: str = "float32") -> Tensor:
    return to_tensor(np.random.default_rng(37).standard_normal(shape).astype(np.float32), dtype)


Run = Callable[[Linear, Schema], Tensor]


def check_gradients(
    case: Linear, schema: Schema, dy: Tensor, tolerances: tuple[float, ...] = (1e-5,) * 3, run: Run = train_forward
) -> None:
    """Of x, weight and bias, as far as they want one: dtype and shape of their leaf, values of the oracle."""
    run(case, schema).backward(dy)
    (n, k), (x, weight, _) = case.weight.shape, case.arrays
    dx, dw, db = oracle.gradients(to_array(dy).reshape(-1, n), x.reshape(-1, k), weight, schema)
    leaves = (case.x, case.weight, case.bias)
    for leaf, expected, tolerance in zip(leaves, (dx.reshape(x.shape), dw, db), tolerances, strict=True):
        if leaf is None or not leaf.requires_grad or (run is not train_forward and leaf is case.weight):
            assert leaf is None or leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape
        assert largest_error(leaf.grad.float(), expected) < tolerance


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 40, 30), (9, 17, 33), (40, 64, 100), *((m, 17, 33) for m in LEADING)]
)
def test_gradients(schema: Schema, m: int | tuple[int, ...], n: int, k: int) -> None:
    case = make_linear(m, n, k, seed=37)
    require_grad(case)
    check_gradients(case, schema, random_dy(*case.x.shape[:-1], n))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_gradients_of_half_precision(schema: Schema, half: str) -> None:
    """Gradients have their leaf's dtype and are right to a few of its roundings."""
    case = make_linear(9, 17, 33, half, seed=38)
    require_grad(case)
    tolerance = 2 * float(torch.finfo(TORCH_DTYPES[half]).eps)
    check_gradients(case, schema, random_dy(9, 17, dtype=half), (tolerance,) * 3)


def test_gradients_of_mixed_dtypes(schema: Schema) -> None:
    """A bfloat16 dY is multiplied in bfloat16 with float32 sums: two roundings. Not with float32 x, and not for db."""
    other = make_linear(9, 17, 33, seed=57)
    case = Linear(make_linear(9, 17, 33, "bfloat16", seed=57).x, other.weight, other.bias, "bfloat16")
    require_grad(case)
    rounding = 2 * float(torch.finfo(torch.bfloat16).eps)
    tolerances = (rounding, rounding if schema.is_int8 else 1e-5, 1e-5)
    check_gradients(case, schema, random_dy(9, 17, dtype="bfloat16"), tolerances)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_wanted_gradients(schema: Schema, wanted: tuple[bool, bool, bool]) -> None:
    case = make_linear(9, 17, 33, seed=40)
    assert case.bias is not None
    for tensor, want in zip((case.x, case.weight, case.bias), wanted, strict=True):
        tensor.requires_grad_(want)
    with torch.no_grad():
        assert not train_forward(case, schema).requires_grad
    assert train_forward(case, schema).requires_grad == any(wanted)
    if any(wanted):
        check_gradients(case, schema, random_dy(9, 17))


def dy_of(kind: str) -> Tensor:
    """Far from 1, which backward neither clips nor narrows; and of y.sum(), whose strides are all 0."""
    return {"tiny": 1e-20 * random_dy(9, 17), "huge": 1e20 * random_dy(9, 17)}.get(kind, torch.ones(()).expand(9, 17))


@pytest.mark.parametrize("kind", ["tiny", "huge", "expanded"])
def test_gradients_of_any_dy(schema: Schema, kind: str) -> None:
    case = make_linear(9, 17, 33, seed=45)
    require_grad(case)
    check_gradients(case, schema, dy_of(kind))


def test_gradients_by_every_kernel(kernel: str) -> None:
    """In training, and through packed weights, which have no gradient themselves."""
    for schema in filter(lambda schema: covers(kernel, schema), oracle.SCHEMAS):
        for run in (train_forward, infer_forward):
            case = make_linear(9, 17, 33, seed=41)
            require_grad(case)
            with KernelRegistry.forced(kernel):
                check_gradients(case, schema, random_dy(9, 17), run=run)


def test_gradients_through_packed_weights(schema: Schema, dtype: str) -> None:
    case = make_linear((3, 3), 17, 33, dtype, seed=42)
    require_grad(case)
    tolerance = 1e-5 if dtype == "float32" else 2 * float(torch.finfo(TORCH_DTYPES[dtype]).eps)
    check_gradients(case, schema, random_dy(3, 3, 17, dtype=dtype), (tolerance,) * 3, infer_forward)


def through_codes(case: Linear, schema: Schema) -> Tensor:
    weight = case.arrays[1]
    scale = oracle.weight_scale(weight, schema)
    codes = torch.from_numpy(oracle.quantize_weight(weight, scale, schema))
    return bitlinear.forward(case.x, None, torch.from_numpy(scale), codes, case.bias, config_of(schema))


def test_gradients_through_plain_codes(schema: Schema) -> None:
    case = make_linear(9, 17, 33, seed=44)
    require_grad(case)
    check_gradients(case, schema, random_dy(9, 17), run=through_codes)


def test_autocast_does_not_change_how_backward_multiplies() -> None:
    """The dtype of dY decides, not the autocast that may be on when it arrives."""
    for of_forward in (False, True):
        gradients = []
        for of_backward in (False, True):
            x, weight, _ = (tensor.clone().requires_grad_() for tensor in make_layer(4))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=of_forward):
                y = bitlinear.forward(x, weight, quant_config=PER_TOKEN, training=True)
            assert y.dtype == (torch.bfloat16 if of_forward else torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=of_backward):
                gradients.append(torch.autograd.grad(y, (x, weight), torch.ones_like(y)))
        for inside, outside in zip(*gradients, strict=True):
            assert_same_bits(inside, outside)


def test_fake_quantization(schema: Schema, dtype: str) -> None:
    """The oracle's values, and the gradient straight through, in the leaf's dtype."""
    case, config = make_linear((3, 3), 17, 33, dtype, seed=48), config_of(schema)
    require_grad(case)
    x, weight, _ = case.arrays
    s_w, s_x = oracle.weight_scale(weight, schema), oracle.x_scale(x, schema)
    fake_weight, fake_x = base.fake_quantize_weight(case.weight, config), base.fake_quantize_x(case.x, config)
    expected = oracle.dequantize_weight(oracle.quantize_weight(weight, s_w, schema), s_w, schema)
    support.assert_same_bits(fake_weight, expected, "float32")
    if schema.is_int8:
        expected = oracle.dequantize_x(oracle.quantize_x(x, s_x, schema), s_x, schema)
        support.assert_same_bits(fake_x, expected, "float32")
    else:
        assert fake_x is case.x
        scale = base.compute_x_scale(case.x, config)
        qx = base.quantize_x(case.x, scale, config)
        assert qx.data_ptr() == case.x.data_ptr()
        assert not qx.requires_grad
        assert not base.dequantize_x(case.x, scale, config).requires_grad
    assert not base.compute_weight_scale(case.weight, config).requires_grad
    for leaf, fake in ((case.x, fake_x), (case.weight, fake_weight)):
        upstream = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(48)).to(fake.dtype)
        (gradient,) = torch.autograd.grad(fake, leaf, upstream)
        assert_same_bits(gradient, upstream.to(leaf.dtype))


# --- the operator -----------------------------------------------------------------------------------------------------


def _close(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == expected.shape
    assert (ours.double() - expected.double()).abs().max() <= relative * expected.double().abs().max()


# Rows, out and in: both sides of the size up to which the engine's loops run, blocks of the weight's columns, of x's,
# and of a product that is rounded to another dtype.
SIZES = [(1, 1, 1), (5, 19, 37), (257, 3, 5), (40, 33, 129), (3, 2700, 407), (2, 6007, 401), (13000, 2, 357)]


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS[::3], ids=id_of)
def test_the_operator_of_all_gradients(config: BitQuantConfig, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, and as torch's operations compute it; also of a dY that is expanded."""
    rows, out_features, in_features = sizes
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(rows, in_features, generator=generator)
    _, qx, x_scale, qweight, scale = native.bitlinear_train(x, weight, None, *config.operator_arguments())
    int8 = config.activation_dtype == "int8"
    kept, kept_scale = (qx, x_scale) if int8 else (x, None)
    wide_x = base.dequantize_x(qx, x_scale, config).double() if int8 else x.double()
    wide_weight = base.dequantize_weight(base.unpack_weights(qweight, in_features), scale, config).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for dy in (
        torch.randn(rows, out_features, generator=generator).to(dtype),
        torch.ones((), dtype=dtype).expand(rows, 1),
    ):
        dy = dy.expand(rows, out_features)
        arguments = (dy, kept, kept_scale, qweight, scale, in_features, config.flags[0])
        groups = config.group_arguments
        expected = (dy.double() @ wide_weight, dy.double().T @ wide_x, dy.double().sum(0))
        for dtypes in ((torch.float32,) * 3, (dtype,) * 3, (torch.float32, None, dtype), (None, dtype, None)):
            found = native.bitlinear_backward(*arguments, *dtypes, *groups)
            plain = torch_ops.bitlinear_backward(*arguments, *dtypes, *groups)
            for gradient, same, reference, wanted in zip(found, plain, expected, dtypes, strict=True):
                if wanted is None:
                    assert gradient.numel() == same.numel() == 0
                    continue
                assert gradient.dtype == same.dtype == wanted
                _close(gradient, reference, tolerance)
                _close(same, reference, tolerance)
            # The floating weight that was quantized serves as well as its codes.
            from_weight = native.bitlinear_backward(*arguments[:3], weight, *arguments[4:], *dtypes, *groups)
            for gradient, same in zip(found, from_weight, strict=True):
                assert_same_bits(gradient, same)
            plain_from_weight = torch_ops.bitlinear_backward(*arguments[:3], weight, *arguments[4:], *dtypes, *groups)
            for gradient, same in zip(plain, plain_from_weight, strict=True):
                assert_same_bits(gradient, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (300, 700)], ids=str)  # the engine's loops, and torch's matmul
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weight_of_any_dtype_is_quantized_again(
    per_channel: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0, 1] = 0.0
    for last in (weight[-1, -1].item(), math.nan):  # a NaN makes its scale NaN and the codes 0
        weight[-1, -1] = last
        x = torch.ones(1, shape[1])
        *_, qweight, scale = native.bitlinear_train(x, weight, None, per_channel, True, True)
        rest = (scale, shape[1], per_channel, torch.float32, None, None)
        dy = torch.randn(2, shape[0])
        expected, found = (native.bitlinear_backward(dy, None, None, w, *rest)[0] for w in (qweight, weight))
        assert_same_bits(found, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 300])  # the engine's loops, and torch's matmul
def test_the_weight_gets_the_same_gradient_in_both_modes(config: BitQuantConfig, dtype: torch.dtype, rows: int) -> None:
    layer = BitLinear(300, 70, quant_config=config).to(dtype)
    x = torch.randn(rows, 300).to(dtype)
    dy = torch.randn(rows, 70).to(dtype)
    in_training, in_evaluation = (
        torch.autograd.grad(layer.train(training)(x), layer.weight, dy)[0] for training in (True, False)
    )
    assert_same_bits(in_training, in_evaluation)


def test_operator_of_gradients_with_codes_and_leading_dimensions() -> None:
    layer = make_layer(2, 3)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    dy = torch.randn(2, 3, 19)
    rest = (None, None, scale, 37, False, torch.float32, None, torch.float32)
    packed = native.bitlinear_backward(dy, *rest[:2], qweight, *rest[2:])
    codes = native.bitlinear_backward(dy, *rest[:2], base.unpack_weights(qweight, 37), *rest[2:])
    assert packed[0].shape == (2, 3, 37)
    for one, other in zip(packed, codes, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(5, 18)}, "dy has"),
        ({1: torch.ones(5, 36, dtype=torch.int8)}, "x has"),
        ({1: torch.ones(4, 37, dtype=torch.int8), 2: torch.ones(4, 1)}, "x has"),
        ({1: None}, "x is None, dweight needs it"),
        ({3: None}, "qweight is None, dx needs it"),
        ({4: None}, "qweight_scale is None, qweight needs it"),
        ({2: None}, "x_scale is None, int8 codes need it"),
        ({4: torch.ones(2)}, "qweight_scale has shape"),
        ({3: torch.zeros(19, 3, dtype=torch.uint8)}, "qweight"),
        ({3: torch.zeros(19, 36)}, "qweight"),
        ({3: torch.zeros(18, 37)}, "dy has"),
        ({7: torch.int8}, "dx_dtype"),
    ],
)
def test_the_operator_of_gradients_refuses(change: dict[int, object], message: str) -> None:
    scale, qweight = bitlinear.prepare_weights(make_layer(5).weight, PER_TOKEN)
    codes = torch.ones(5, 37, dtype=torch.int8)
    arguments = [torch.ones(5, 19), codes, torch.ones(5, 1), qweight, scale, 37, False, *[torch.float32] * 3]
    native.bitlinear_backward(*arguments)
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        native.bitlinear_backward(*arguments)
