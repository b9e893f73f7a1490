"""Training: the bits of inference, straight-through gradients, and 200 steps beside a plain PyTorch network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import oracle
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear
from bitcore.ops.base import fake_quantize_weight, fake_quantize_x
from oracle import Doubles, Schema
from support import (
    INT8_KERNELS,
    TORCH_DTYPES,
    Linear,
    assert_forward,
    assert_same_bits,
    config_of,
    covers,
    make_linear,
    proves,
    same_bits,
    to_array,
    to_tensor,
    torch_threads,
)

STEPS = 200


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


def largest_error(found: torch.Tensor, expected: torch.Tensor | Doubles) -> float:
    """Largest difference over the largest entry."""
    want = expected.detach().double().numpy() if isinstance(expected, torch.Tensor) else expected
    largest = np.abs(want).max(initial=0.0)
    return float(np.abs(found.detach().double().numpy() - want).max(initial=0.0) / (largest or 1.0))


# --- training equals inference --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 130, 300), (13, 67, 131), ((2, 3), 16, 64), (0, 5, 7)])
def test_training_equals_inference(schema: Schema, dtype: str, m: int | tuple[int, ...], n: int, k: int) -> None:
    for bias in (True, False):
        case = make_linear(m, n, k, dtype, bias=bias, seed=31)
        y = train_forward(case, schema)
        assert same_bits(y, infer_forward(case, schema))
        assert_forward(y, *case.arrays, schema, dtype)


def test_training_equals_inference_by_every_kernel(kernel: str) -> None:
    for schema in oracle.SCHEMAS:
        if not covers(kernel, schema):
            continue
        case = make_linear(14, 37, 131, seed=32)
        with KernelRegistry.forced(kernel), proves(kernel):
            trained = train_forward(case, schema)
        with KernelRegistry.forced(kernel), proves(kernel):
            inferred = infer_forward(case, schema)
        assert same_bits(trained, inferred)
        assert_forward(trained, *case.arrays, schema, "float32")


def test_training_alone_decides(schema: Schema) -> None:
    """Neither grad mode nor inference mode changes the bits, and arguments of the other mode are ignored."""
    case = make_linear(5, 20, 33, seed=33)
    require_grad(case)
    config = config_of(schema)
    scale, qweight = bitlinear.prepare_weights(case.weight.detach(), config)
    expected = infer_forward(case, schema)
    junk = torch.full((2, 2), torch.nan)
    with torch.no_grad():
        assert same_bits(train_forward(case, schema), expected)
        y = bitlinear.forward(case.x, case.weight, junk, junk, case.bias, config, training=True)
        assert same_bits(y, expected)
    with torch.inference_mode():
        assert same_bits(train_forward(case, schema), expected)
        y = bitlinear.forward(case.x, junk, scale, qweight, case.bias, config, training=False)
        assert same_bits(y, expected)


def test_mixed_dtypes(int8_schema: Schema) -> None:
    """x, weight and bias widen on their own; y has the dtype of x."""
    for x_dtype in oracle.OUTPUT_DTYPES:
        for weight_dtype in oracle.OUTPUT_DTYPES:
            x = make_linear(5, 20, 33, x_dtype, seed=34).x
            other = make_linear(5, 20, 33, weight_dtype, seed=35)
            case = Linear(x, other.weight, other.bias, x_dtype)
            assert_forward(train_forward(case, int8_schema), *case.arrays, int8_schema, x_dtype)
            assert_forward(infer_forward(case, int8_schema), *case.arrays, int8_schema, x_dtype)


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_autocast_decides_the_output_alone(schema: Schema, autocast: str) -> None:
    """Under autocast x is not cast: y is the float32 result rounded once."""
    case = make_linear(13, 33, 70, seed=36)
    with torch.autocast("cpu", TORCH_DTYPES[autocast]):
        trained, inferred = train_forward(case, schema), infer_forward(case, schema)
    assert same_bits(trained, inferred)
    assert_forward(trained, *case.arrays, schema, autocast)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 40, 30), (9, 17, 33), (40, 64, 100)])
def test_gradients(schema: Schema, m: int, n: int, k: int) -> None:
    case = make_linear(m, n, k, seed=37)
    leaves = require_grad(case)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
    train_forward(case, schema).backward(dy)
    x, weight, _ = case.arrays
    for leaf, expected in zip(leaves, oracle.gradients(to_array(dy), x, weight, schema), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape
        assert largest_error(leaf.grad, expected) < 1e-5


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_gradients_of_half_precision(schema: Schema, half: str) -> None:
    """Gradients have their leaf's dtype and are right to a few of its roundings."""
    case = make_linear(9, 17, 33, half, seed=38)
    leaves = require_grad(case)
    dy = to_tensor(np.random.default_rng(38).standard_normal((9, 17)).astype(np.float32), half)
    train_forward(case, schema).backward(dy)
    x, weight, _ = case.arrays
    tolerance = 2 * float(torch.finfo(TORCH_DTYPES[half]).eps)
    for leaf, expected in zip(leaves, oracle.gradients(to_array(dy), x, weight, schema), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert largest_error(leaf.grad.float(), expected) < tolerance


def bfloat16_tolerances(schema: Schema) -> tuple[float, float, float]:
    """A bfloat16 dY is multiplied in bfloat16 with float32 sums: two roundings. Not with float32 x, and not for db."""
    rounding = 2 * float(torch.finfo(torch.bfloat16).eps)
    return rounding, rounding if schema.is_int8 else 1e-5, 1e-5


def test_gradients_of_mixed_dtypes(schema: Schema) -> None:
    """Each leaf's gradient has the leaf's own dtype."""
    x = make_linear(9, 17, 33, "bfloat16", seed=57).x
    other = make_linear(9, 17, 33, "float32", seed=57)
    case = Linear(x, other.weight, other.bias, "bfloat16")
    leaves = require_grad(case)
    dy = to_tensor(np.random.default_rng(57).standard_normal((9, 17)).astype(np.float32), "bfloat16")
    train_forward(case, schema).backward(dy)
    expected = oracle.gradients(to_array(dy), *case.arrays[:2], schema)
    for leaf, gradient, tolerance in zip(leaves, expected, bfloat16_tolerances(schema), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert largest_error(leaf.grad.float(), gradient) < tolerance


def test_gradients_under_autocast(schema: Schema) -> None:
    """Autocast rounds y and so dY to bfloat16; gradients keep the dtypes of their leaves."""
    case = make_linear(9, 17, 33, seed=58)
    leaves = require_grad(case)
    dy = to_tensor(np.random.default_rng(58).standard_normal((9, 17)).astype(np.float32), "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        y = train_forward(case, schema)
        y.backward(dy)
    expected = oracle.gradients(to_array(dy), *case.arrays[:2], schema)
    for leaf, gradient, tolerance in zip(leaves, expected, bfloat16_tolerances(schema), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert largest_error(leaf.grad, gradient) < tolerance


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0)])
def test_gradients_of_leading_dimensions(schema: Schema, leading: tuple[int, ...]) -> None:
    case = make_linear(leading, 17, 33, seed=39)
    leaves = require_grad(case)
    dy = torch.randn(*leading, 17, generator=torch.Generator().manual_seed(39))
    train_forward(case, schema).backward(dy)
    x, weight, _ = case.arrays
    dx, dw, db = oracle.gradients(to_array(dy).reshape(-1, 17), x.reshape(-1, 33), weight, schema)
    for leaf, expected in zip(leaves, (dx.reshape(x.shape), dw, db), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert largest_error(leaf.grad, expected) < 1e-5


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients(schema: Schema, wanted: tuple[bool, bool, bool]) -> None:
    case = make_linear(9, 17, 33, seed=40)
    assert case.bias is not None
    tensors = (case.x, case.weight, case.bias)
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    dy = torch.randn(9, 17, generator=torch.Generator().manual_seed(40))
    train_forward(case, schema).backward(dy)
    expected = oracle.gradients(to_array(dy), *case.arrays[:2], schema)
    for tensor, want, gradient in zip(tensors, wanted, expected, strict=True):
        assert (tensor.grad is not None) == want
        assert tensor.grad is None or largest_error(tensor.grad, gradient) < 1e-5


def test_gradients_by_every_kernel(kernel: str) -> None:
    for schema in oracle.SCHEMAS:
        if not covers(kernel, schema):
            continue
        case = make_linear(9, 17, 33, seed=41)
        leaves = require_grad(case)
        dy = torch.randn(9, 17, generator=torch.Generator().manual_seed(41))
        with KernelRegistry.forced(kernel):
            train_forward(case, schema).backward(dy)
        for leaf, expected in zip(leaves, oracle.gradients(to_array(dy), *case.arrays[:2], schema), strict=True):
            assert leaf.grad is not None
            assert largest_error(leaf.grad, expected) < 1e-5


def test_gradients_through_packed_weights(schema: Schema, dtype: str) -> None:
    """Inference gives x and bias their gradients; the packed weight has none."""
    case = make_linear((3, 3), 17, 33, dtype, seed=42)
    assert case.bias is not None
    case.x.requires_grad_()
    case.bias.requires_grad_()
    dy = to_tensor(np.random.default_rng(42).standard_normal((3, 3, 17)).astype(np.float32), dtype)
    y = infer_forward(case, schema)
    assert y.requires_grad
    y.backward(dy)
    x, weight, _ = case.arrays
    dx, _, db = oracle.gradients(to_array(dy).reshape(9, 17), x.reshape(9, 33), weight, schema)
    tolerance = 1e-5 if dtype == "float32" else 2 * float(torch.finfo(TORCH_DTYPES[dtype]).eps)
    for leaf, expected in ((case.x, dx.reshape(x.shape)), (case.bias, db)):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert largest_error(leaf.grad.float(), expected) < tolerance


def test_gradients_through_packed_weights_by_every_kernel(kernel: str) -> None:
    for schema in oracle.SCHEMAS:
        if not covers(kernel, schema):
            continue
        case = make_linear(9, 17, 33, seed=43)
        case.x.requires_grad_()
        dy = torch.randn(9, 17, generator=torch.Generator().manual_seed(43))
        with KernelRegistry.forced(kernel):
            infer_forward(case, schema).backward(dy)
        dx, _, _ = oracle.gradients(to_array(dy), *case.arrays[:2], schema)
        assert case.x.grad is not None
        assert largest_error(case.x.grad, dx) < 1e-5


def test_gradients_through_plain_codes(schema: Schema) -> None:
    case = make_linear(9, 17, 33, seed=44)
    x, weight, _ = case.arrays
    scale = oracle.weight_scale(weight, schema)
    codes = torch.from_numpy(oracle.quantize_weight(weight, scale, schema))
    case.x.requires_grad_()
    dy = torch.randn(9, 17, generator=torch.Generator().manual_seed(44))
    y = bitlinear.forward(
        case.x, qweight_scale=torch.from_numpy(scale), qweight=codes, bias=case.bias, quant_config=config_of(schema)
    )
    y.backward(dy)
    assert case.x.grad is not None
    assert largest_error(case.x.grad, oracle.gradients(to_array(dy), x, weight, schema)[0]) < 1e-5


def test_gradients_ignore_magnitude_of_dy(schema: Schema) -> None:
    """dY far from 1 loses nothing: backward neither clips nor narrows it."""
    for factor in (1e-20, 1e20):
        case = make_linear(9, 17, 33, seed=45)
        leaves = require_grad(case)
        dy = torch.randn(9, 17, generator=torch.Generator().manual_seed(45)) * factor
        train_forward(case, schema).backward(dy)
        for leaf, expected in zip(leaves, oracle.gradients(to_array(dy), *case.arrays[:2], schema), strict=True):
            assert leaf.grad is not None
            assert largest_error(leaf.grad, expected) < 1e-5


def test_gradients_of_expanded_dy(schema: Schema) -> None:
    """y.sum() hands backward a dY whose strides are all 0."""
    case = make_linear(9, 17, 33, seed=46)
    leaves = require_grad(case)
    train_forward(case, schema).sum().backward()
    expected = oracle.gradients(np.ones((9, 17), np.float32), *case.arrays[:2], schema)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert largest_error(leaf.grad, gradient) < 1e-5


def test_fake_quantization_is_straight_through(schema: Schema) -> None:
    case = make_linear(9, 17, 33, seed=48)
    x, weight, _ = case.arrays
    leaves = require_grad(case)
    config = config_of(schema)
    s_w, s_x = oracle.weight_scale(weight, schema), oracle.x_scale(x, schema)
    fake_weight, fake_x = fake_quantize_weight(case.weight, config), fake_quantize_x(case.x, config)
    codes = oracle.quantize_weight(weight, s_w, schema)
    assert_same_bits(fake_weight, oracle.dequantize_weight(codes, s_w, schema), "float32")
    if schema.is_int8:
        x = oracle.dequantize_x(oracle.quantize_x(x, s_x, schema), s_x, schema)
    assert_same_bits(fake_x, x, "float32")
    for leaf, fake in zip(leaves[:2], (fake_x, fake_weight), strict=True):
        seed = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(48))
        (gradient,) = torch.autograd.grad(fake, leaf, seed)
        assert torch.equal(gradient, seed)


# --- 200 steps beside plain PyTorch ---------------------------------------------------------------------------------


def plain_codes(values: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Integer codes whose gradient is that of values / scale."""
    quotient = values / scale
    return quotient + (quotient.round().clamp(low, high) - quotient).detach()


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, schema: Schema) -> torch.Tensor:
    """The layer in plain float32 PyTorch; products of codes are integers far below 2^24, exact in any order."""
    if schema.weight_per_channel:
        s_w = weight.detach().abs().double().mean(dim=1, keepdim=True).float().clamp(min=1e-5)
    else:
        s_w = weight.detach().abs().double().mean().float().clamp(min=1e-5)
    s_x, codes = torch.ones(()), x
    if schema.is_int8:
        absmax = x.detach().abs()
        absmax = absmax.amax(dim=-1, keepdim=True) if schema.x_per_channel else absmax.amax()
        s_x = absmax.clamp(min=1e-5) / 127
        codes = plain_codes(x, s_x, -128, 127)
    y = functional.linear(codes, plain_codes(weight, s_w, -1, 1)) * (s_x * s_w.reshape(-1))
    return y if bias is None else y + bias


def ours_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, schema: Schema) -> torch.Tensor:
    return bitlinear.forward(x=x, weight=weight, bias=bias, quant_config=config_of(schema), training=True)


@pytest.mark.medium
@pytest.mark.usefixtures("one_thread")
def test_200_training_steps(schema: Schema) -> None:
    """Two layers learn to classify; at each step plain PyTorch, from a copy of our weights, must agree."""
    generator = torch.Generator().manual_seed(50)
    centers = 0.7 * torch.randn(5, 37, generator=generator)
    shapes = [(29, 37), (29,), (5, 29), (5,)]
    ours = [(0.3 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    optimizer = torch.optim.AdamW(ours, lr=0.01)
    losses, codes_before = [], torch.sign(ours[0].detach())
    for _ in range(STEPS):
        labels = torch.randint(5, (24,), generator=generator)
        x = centers[labels] + torch.randn(24, 37, generator=generator)
        plain = [tensor.detach().clone().requires_grad_() for tensor in ours]
        results = []
        for linear, parameters in ((ours_linear, ours), (plain_linear, plain)):
            leaf = x.clone().requires_grad_()
            hidden = linear(leaf, parameters[0], parameters[1], schema)
            logits = linear(functional.gelu(hidden), parameters[2], parameters[3], schema)
            loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)  # Gradients stay far from 0.
            gradients = torch.autograd.grad(loss, [leaf, *parameters])
            results.append((hidden, logits, loss, gradients))
        (hidden, logits, loss, gradients), (plain_hidden, plain_logits, _, plain_gradients) = results
        if schema.is_int8:
            assert same_bits(hidden, plain_hidden)
            assert same_bits(logits, plain_logits)
        assert largest_error(logits, plain_logits) < 1e-5
        for gradient, expected in zip(gradients, plain_gradients, strict=True):
            assert largest_error(gradient, expected) < 1e-5
        for tensor, gradient in zip(ours, gradients[1:], strict=True):
            tensor.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5]), "the network does not learn"
    assert (torch.sign(ours[0].detach()) != codes_before).any(), "no weight changed its sign"


def test_deployed_network_has_the_trained_bits(schema: Schema) -> None:
    case, second = make_linear(24, 29, 37, seed=51), make_linear(24, 5, 29, seed=52)
    hidden = functional.gelu(train_forward(case, schema))
    trained = ours_linear(hidden, second.weight, second.bias, schema)
    hidden = functional.gelu(infer_forward(case, schema))
    deployed = infer_forward(Linear(hidden, second.weight, second.bias, "float32"), schema)
    assert same_bits(trained, deployed)


# --- threads, batches, kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4100, 1025), (70, 530, 257), (3000, 33, 64)])
def test_thread_count_changes_no_bit_of_training(schema: Schema, m: int, n: int, k: int) -> None:
    outputs = []
    for threads in (1, 2, 3):
        case = make_linear(m, n, k, seed=53)
        with torch_threads(threads):
            outputs.append(train_forward(case, schema))
    assert all(same_bits(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("schema", [schema for schema in oracle.SCHEMAS if schema.x_per_channel], ids=str)
def test_row_of_training_depends_on_itself_alone(schema: Schema) -> None:
    case = make_linear(40, 45, 130, seed=54)
    whole = train_forward(case, schema)
    for rows in ([0], [39], [3, 2], list(range(7, 30))):
        part = train_forward(Linear(case.x[rows], case.weight, case.bias, "float32"), schema)
        assert same_bits(part, whole[rows])


def test_per_tensor_ties_rows_together() -> None:
    """The documented price of one scale for all of x: another row changes this one."""
    case = make_linear(4, 45, 130, seed=55)
    alone = train_forward(Linear(case.x[:1], case.weight, case.bias, "float32"), Schema())
    case.x[3] *= 100
    assert not same_bits(alone, train_forward(case, Schema())[:1])


def test_training_is_lossless_across_kernels(int8_schema: Schema, dtype: str) -> None:
    outputs = []
    for name in INT8_KERNELS:
        case = make_linear(29, 75, 333, dtype, seed=56)
        with KernelRegistry.forced(name), proves(name):
            outputs.append(train_forward(case, int8_schema))
    assert len(outputs) >= 4
    assert all(same_bits(output, outputs[0]) for output in outputs)
