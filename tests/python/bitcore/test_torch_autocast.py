"""Autocast: y has its dtype, rounded once from what it would be outside; nothing else is cast.

Gradients are those of a float32 dY: to the bit with float16, to bfloat16's rounding where dY is bfloat16, because it is
multiplied in bfloat16 then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear
from core_helpers import CONFIGS, DTYPES, PER_TOKEN, id_of, make_layer

PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "native": nullcontext,
    "TorchKernel": lambda: KernelRegistry.forced("TorchKernel"),
}
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def steps(config: BitQuantConfig) -> dict[str, Step]:
    """Every way from x, weight and bias to y."""

    def evaluated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer = BitLinear(37, 19, quant_config=config).eval()
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        return layer(x)

    def inference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bitlinear.forward(x, None, *bitlinear.prepare_weights(weight, config), bias, config)

    return {
        "training": lambda x, weight, bias: bitlinear.forward(x, weight, bias=bias, quant_config=config, training=True),
        "inference": inference,
        "BitLinear in evaluation": evaluated,
    }


def leaves(dtype: torch.dtype) -> list[Tensor]:
    """x of the dtype, weight and bias of others."""
    x, weight, bias = make_layer(2, 3)
    others = [other for other in DTYPES if other is not dtype]
    return [
        torch.nn.Parameter(x.to(dtype)),
        torch.nn.Parameter(weight.to(others[0])),
        torch.nn.Parameter(bias.to(others[1])),
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_outputs_and_gradients(config: BitQuantConfig, dtype: torch.dtype, cast: torch.dtype, path: str) -> None:
    dy = torch.randn(2, 3, 19, generator=torch.Generator().manual_seed(5)).to(cast).float()
    with PATHS[path]():
        for name, step in steps(config).items():
            x, weight, bias = leaves(dtype)
            # Outside, and of a float32 x, whose y is the unrounded one.
            wide_leaves = [torch.nn.Parameter(x.detach().float()), *leaves(dtype)[1:]]
            wide = step(*wide_leaves)
            with torch.autocast("cpu", dtype=cast):
                y = step(x, weight, bias)
                with torch.autocast("cpu", enabled=False):
                    assert step(x, weight, bias).dtype == dtype
            assert_same_bits(y.detach(), wide.detach().to(cast), name)
            gradients = torch.autograd.grad(y, [x, weight, bias], dy.to(cast), allow_unused=True)
            expected = torch.autograd.grad(wide, wide_leaves, dy, allow_unused=True)
            for leaf, gradient, other in zip((x, weight, bias), gradients, expected, strict=True):
                assert (gradient is None) == (other is None) == (name == "inference" and leaf is weight)
                if gradient is not None and other is not None:
                    exact = cast is torch.float16 or leaf is bias
                    assert_same_gradient(gradient, other.to(leaf.dtype), exact, name)


def assert_same_gradient(gradient: Tensor, expected: Tensor, exact: bool, name: str) -> None:
    """The same bits, or the same to bfloat16's rounding of products."""
    if exact:
        assert_same_bits(gradient, expected, name)
        return
    assert gradient.dtype == expected.dtype
    difference = (gradient.double() - expected.double()).abs().max()
    assert difference <= 2 * torch.finfo(torch.bfloat16).eps * expected.double().abs().max(), name


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_base_operations_and_weights_are_not_cast(config: BitQuantConfig) -> None:
    x, weight, _ = make_layer(4)

    def everything() -> list[Tensor]:
        scale, qweight = bitlinear.prepare_weights(weight, config)
        codes = base.quantize_weight(weight, scale, config)
        x_scale = base.compute_x_scale(x, config)
        qx = base.quantize_x(x, x_scale, config)
        return [
            scale,
            qweight,
            codes,
            base.compute_weight_scale(weight, config),
            base.dequantize_weight(codes, scale, config),
            base.fake_quantize_weight(weight, config),
            x_scale,
            qx,
            base.dequantize_x(qx, x_scale, config),
            base.fake_quantize_x(x, config),
        ]

    outside = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything()
    for ours, expected in zip(inside, outside, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


def test_a_deployed_layer_keeps_its_scale_in_float32() -> None:
    layer = BitLinear(37, 19, quant_config=PER_TOKEN).deploy()
    x = make_layer(4).x
    wide = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(layer(x).detach(), wide.detach().to(torch.bfloat16))
    assert layer.qweight_scale is not None
    assert layer.qweight_scale.dtype == torch.float32
