"""Scales per group: what is particular to them. That they hold what all configs hold, the other tests show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.config import GROUP_SIZES, BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels.registry import KernelRegistry
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from core_helpers import make_layer
from support import NATIVE_KERNELS

G32 = BitQuantConfig("per_group", group_size=32)
X32 = BitQuantConfig("per_group", "int8", "per_group", 32)
KERNELS = [name for name in KernelRegistry.list_available_kernels() if name in {*NATIVE_KERNELS, "TorchKernel"}]


@pytest.mark.parametrize("in_features", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_shapes(in_features: int, group_size: int) -> None:
    """The last group may be shorter, and the only one."""
    layer = make_layer(2, 3, out_features=5, in_features=in_features)
    config = BitQuantConfig("per_group", "int8", "per_group", group_size)
    groups = -(-in_features // group_size)
    scale, qweight = bitlinear.prepare_weights(layer.weight, config)
    assert (scale.shape, scale.dtype) == ((5, groups), torch.float16)
    assert torch.equal(scale, base.compute_weight_scale(layer.weight, config))
    assert base.compute_x_scale(layer.x, config).shape == (2, 3, groups)
    y = bitlinear.forward(layer.x, None, scale, qweight, layer.bias, config)
    assert_same_bits(y, bitlinear.forward(layer.x, layer.weight, bias=layer.bias, quant_config=config, training=True))


def test_a_scale_is_the_rounded_mean_and_codes_use_it() -> None:
    weight = torch.tensor([[1.0, 1.0 + 2**-11] * 16])  # The mean, 1 + 2^-12, rounds to 1 in float16.
    scale = base.compute_weight_scale(weight, G32)
    assert scale.item() == 1
    weight = torch.cat([weight[:, :31], torch.tensor([[0.5]])], 1)
    weight[0, 0] += 0.5
    assert base.compute_weight_scale(weight, G32).item() == 1
    assert base.quantize_weight(weight, base.compute_weight_scale(weight, G32), G32)[0, -1] == 0  # A tie: to even.


@pytest.mark.parametrize(("value", "expected"), [(0.0, 2**-14), (2**-14, 2**-14), (2**-13, 2**-13), (65504.0, 65504.0)])
def test_bounds_of_a_scale(value: float, expected: float) -> None:
    scale, _ = bitlinear.prepare_weights(torch.full((2, 40), value), G32)
    assert torch.equal(scale, torch.full((2, 2), expected, dtype=torch.float16))


@pytest.mark.parametrize("value", [65504.1, 65519.0, 65520.0, 1e30, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", ["native", "TorchKernel"])
def test_a_mean_that_float16_cannot_hold(value: float, kernel: str) -> None:
    weight = torch.ones(3, 70)
    weight[1, 32:64] = value
    assert base.compute_weight_scale(weight, G32).isnan().nonzero().tolist() == [[1, 1]]
    with KernelRegistry.forced(*(["TorchKernel"] if kernel == "TorchKernel" else [])):
        with pytest.raises(QuantizationError, match="NaN|65504"):
            bitlinear.prepare_weights(weight, G32)
        y = bitlinear.forward(torch.ones(2, 70), weight, quant_config=G32, training=True)
    assert torch.equal(y.isnan(), torch.tensor([[False, True, False]] * 2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (16, 8), (36, 9)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_scales_that_are_not_usable(kernel: str, value: float, place: tuple[int, int], rows: int) -> None:
    for config in (G32, BitQuantConfig("per_group", "float32", "per_channel", 32)):
        if not kernel.startswith(("Reference", "Torch", config.activation_dtype.capitalize())):
            continue
        layer = make_layer(rows, out_features=37, in_features=300)
        scale, qweight = bitlinear.prepare_weights(layer.weight, config)
        scale[place] = value
        with (
            KernelRegistry.forced(kernel),
            pytest.raises(QuantizationError, match="qweight_scale.*finite and positive"),
        ):
            bitlinear.forward(layer.x, None, scale, qweight, None, config)


def test_a_subnormal_scale_is_usable() -> None:
    layer = make_layer(3, out_features=20, in_features=64)
    scale, qweight = bitlinear.prepare_weights(layer.weight, G32)
    scale[:] = 2**-24
    y = bitlinear.forward(layer.x, None, scale, qweight, None, G32)
    with KernelRegistry.forced("TorchKernel"):
        assert_same_bits(y, bitlinear.forward(layer.x, None, scale, qweight, None, G32))
    assert y.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.float(), ("float32", "float16")),
        (lambda s: s.bfloat16(), ("bfloat16", "float16")),
        (lambda s: s[:, :2], ("(5, 2)", "(5, 4)")),
        (lambda s: s.repeat(1, 2), ("(5, 8)", "(5, 4)")),
        (lambda s: s[:4], ("(4, 4)", "(5, 4)")),
        (lambda s: s.reshape(-1), ("(20,)", "(5, 4)")),
        (lambda s: s[0, 0], ("()", "(5, 4)")),
    ],
)
@pytest.mark.parametrize("kernel", ["native", "TorchKernel"])
def test_scales_of_another_form(change: Any, words: tuple[str, ...], kernel: str) -> None:
    """Those of groups of 64 have half as many, for example."""
    layer = make_layer(3, out_features=5, in_features=128)
    scale, qweight = bitlinear.prepare_weights(layer.weight, G32)
    forced = KernelRegistry.forced(*(["TorchKernel"] if kernel == "TorchKernel" else []))
    with forced, pytest.raises(QuantizationError, match="qweight_scale") as caught:
        bitlinear.forward(layer.x, None, change(scale), qweight, None, G32)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(QuantizationError, match="scale"):
        base.quantize_weight(layer.weight, change(scale), G32)


def test_scales_of_another_granularity() -> None:
    layer = make_layer(3, out_features=5, in_features=128)
    per_channel = BitQuantConfig("per_channel")
    scale, qweight = bitlinear.prepare_weights(layer.weight, G32)
    with pytest.raises(QuantizationError, match=r"qweight_scale.*float16.*float32"):
        bitlinear.forward(layer.x, None, scale, qweight, None, per_channel)
    with pytest.raises(QuantizationError, match=r"scale.*\(3, 4\).*\(3, 1\)"):
        base.quantize_x(layer.x, base.compute_x_scale(layer.x, X32), G32)


def grouped_reference(layer: Any, config: BitQuantConfig) -> Tensor:
    """y of one linear after the other: group by group, in float64."""
    total = torch.zeros(*layer.x.shape[:-1], len(layer.weight), dtype=torch.float64)
    for x, weight in zip(layer.x.split(config.group_size, -1), layer.weight.split(config.group_size, -1), strict=True):
        scale = weight.double().abs().mean(1, keepdim=True).float().clamp(min=2**-14).half().float()
        codes = (weight / scale).round().clamp(-1, 1)
        if config.activation_granularity == "per_group":
            s_x = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / torch.tensor(127.0)
            x = (x / s_x).round().clamp(-128, 127) * s_x
        total += x.double() @ (codes * scale).double().t()
    return total


def test_it_is_a_sum_of_linears() -> None:
    """As of smaller layers, one for each group, whose outputs are added."""
    layer = make_layer(7, out_features=20, in_features=333)
    for size in GROUP_SIZES:
        for config in (
            BitQuantConfig("per_group", "int8", "per_group", size),
            BitQuantConfig("per_group", "float32", "per_channel", size),
        ):
            y = bitlinear.forward(layer.x, layer.weight, quant_config=config, training=True)
            torch.testing.assert_close(y.double(), grouped_reference(layer, config), rtol=1e-5, atol=1e-5)


def test_one_group_is_a_channel_but_for_the_scale() -> None:
    layer = make_layer(6, out_features=20, in_features=100)
    scale, qweight = bitlinear.prepare_weights(layer.weight, BitQuantConfig("per_group"))
    y = bitlinear.forward(layer.x, None, scale, qweight, layer.bias, BitQuantConfig("per_group"))
    as_channel = bitlinear.forward(
        layer.x, None, scale.float().reshape(-1), qweight, layer.bias, BitQuantConfig("per_channel")
    )
    assert_same_bits(y, as_channel)
