"""Training: the bits of inference, and 200 steps beside a plain PyTorch network. Gradients: test_gradients.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import oracle
from bitcore.kernels import KernelRegistry
from bitcore.ops import bitlinear
from oracle import Schema
from support import (
    Linear,
    assert_forward,
    config_of,
    covers,
    infer_forward,
    largest_error,
    make_linear,
    proves,
    require_grad,
    same_bits,
    torch_threads,
    train_forward,
)

STEPS = 200


# --- training equals inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 130, 300), (13, 67, 131), ((2, 3), 16, 64), (0, 5, 7)])
def test_training_equals_inference(schema: Schema, dtype: str, m: int | tuple[int, ...], n: int, k: int) -> None:
    for bias in (True, False):
        case = make_linear(m, n, k, dtype, bias=bias, seed=31)
        y = train_forward(case, schema)
        assert same_bits(y, infer_forward(case, schema))
        assert_forward(y, *case.arrays, schema, dtype)


def test_training_equals_inference_by_every_kernel(kernel: str, dtype: str) -> None:
    for schema in oracle.SCHEMAS:
        if not covers(kernel, schema):
            continue
        case = make_linear(14, 37, 131, dtype, seed=32)
        with KernelRegistry.forced(kernel), proves(kernel):
            trained = train_forward(case, schema)
        with KernelRegistry.forced(kernel), proves(kernel):
            inferred = infer_forward(case, schema)
        assert same_bits(trained, inferred)
        assert_forward(trained, *case.arrays, schema, dtype)


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


def test_per_tensor_ties_rows_together() -> None:
    """The documented price of one scale for all of x: another row changes this one."""
    case = make_linear(4, 45, 130, seed=55)
    alone = train_forward(Linear(case.x[:1], case.weight, case.bias, "float32"), Schema())
    case.x[3] *= 100
    assert not same_bits(alone, train_forward(case, Schema())[:1])


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4100, 1025), (70, 530, 257), (3000, 33, 64)])
def test_thread_count_changes_no_bit_of_training(schema: Schema, m: int, n: int, k: int) -> None:
    outputs = []
    for threads in (1, 2, 3):
        case = make_linear(m, n, k, seed=53)
        with torch_threads(threads):
            outputs.append(train_forward(case, schema))
    assert all(same_bits(output, outputs[0]) for output in outputs)


# --- 200 steps beside plain PyTorch -----------------------------------------------------------------------------------


def plain_codes(values: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Integer codes whose gradient is that of values / scale."""
    quotient = values / scale
    return quotient + (quotient.round().clamp(low, high) - quotient).detach()


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, schema: Schema) -> torch.Tensor:
    """The layer in plain float32 PyTorch; products of codes are integers far below 2^24, exact in any order."""
    if schema.weight_per_group:
        y = sum(plain_group(x[..., group], weight[:, group], x, schema) for group in schema.slices(x.shape[-1]))
        assert isinstance(y, torch.Tensor)
        return y if bias is None else y + bias
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


def plain_group(x: torch.Tensor, weight: torch.Tensor, whole_x: torch.Tensor, schema: Schema) -> torch.Tensor:
    """Of the columns of one group; `whole_x` has all."""
    s_w = weight.detach().abs().double().mean(dim=1, keepdim=True).float().clamp(min=2**-14).half().float()
    s_x, codes = torch.ones(()), x
    if schema.is_int8:
        absmax = (x if schema.x_per_group else whole_x).detach().abs()
        per_tensor = schema.activation_granularity == "per_tensor"
        s_x = (absmax.amax() if per_tensor else absmax.amax(dim=-1, keepdim=True)).clamp(min=1e-5) / 127
        codes = plain_codes(x, s_x, -128, 127)
    return functional.linear(codes, plain_codes(weight, s_w, -1, 1)) * (s_x * s_w.reshape(-1))


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
