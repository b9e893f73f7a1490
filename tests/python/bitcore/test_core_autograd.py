"""What autograd is told: what is saved for backward, and which derivatives there are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear
from core_helpers import CONFIGS, PER_TOKEN, Layer, id_of, make_layer

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)


def _leaves(layer: Layer) -> Layer:
    return Layer(*(tensor.detach().clone().requires_grad_() for tensor in layer))


@all_configs
def test_saved_for_backward_are_codes_and_not_float_copies(config: BitQuantConfig) -> None:
    layer = _leaves(make_layer(64, out_features=64, in_features=64))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bitlinear.forward(layer.x, layer.weight, bias=layer.bias, quant_config=config, training=True)
    floats = [t for t in saved if t.is_floating_point() and t.numel() > 64 and t.data_ptr() != layer.x.data_ptr()]
    scales = 64 * 2 if config.weight_granularity == "per_group" else 0
    assert all(t.numel() == scales for t in floats)
    assert sum(t.nbytes for t in saved if t.dtype == torch.uint8) == 64 * (16 + 1)


def test_a_changed_parameter_is_noticed() -> None:
    """Backward needs the weight of the forward: as torch's own layers, it refuses another one."""
    layer = BitLinear(8, 4)
    y = layer(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    layer = _leaves(make_layer(4))
    y = bitlinear.forward(layer.x, layer.weight, quant_config=PER_TOKEN, training=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), layer.x, create_graph=True)


@pytest.mark.parametrize("kernel", ["native", "TorchKernel"])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_forward_mode_derivatives_are_refused(name: str, kernel: str) -> None:
    layer = make_layer(4)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    forced = KernelRegistry.forced(*(["TorchKernel"] if kernel == "TorchKernel" else []))
    with forced, forward_ad.dual_level():
        dual = layer._replace(**{name: forward_ad.make_dual(getattr(layer, name), getattr(layer, name))})
        with pytest.raises(NotImplementedError, match="forward-mode"):
            bitlinear.forward(dual.x, dual.weight, bias=dual.bias, quant_config=PER_TOKEN, training=True)
        if name != "weight":
            with pytest.raises(NotImplementedError, match="forward-mode"), torch.no_grad():
                bitlinear.forward(dual.x, None, scale, qweight, dual.bias, PER_TOKEN)
        bitlinear.forward(*layer[:2], bias=layer.bias, quant_config=PER_TOKEN, training=True)


def test_transforms_are_refused_and_what_they_leave_behind_is_taken() -> None:
    layer = _leaves(make_layer(3))
    left_behind: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        left_behind.append(x)
        return (x * 2).sum()

    def ours(x: Tensor) -> Tensor:
        return bitlinear.forward(x, layer.weight, quant_config=PER_TOKEN, training=True).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(ours)(layer.x.detach())
    torch.func.grad(loss)(layer.x.detach())
    (expected,) = torch.autograd.grad(ours(layer.x.detach()), layer.weight)
    (found,) = torch.autograd.grad(ours(left_behind[0]), layer.weight)
    assert_same_bits(found, expected)


def test_jvp_of_fake_quantization_is_refused() -> None:
    layer = make_layer(4)
    for function, value in ((base.fake_quantize_x, layer.x), (base.fake_quantize_weight, layer.weight)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda leaf, function=function: function(leaf, PER_TOKEN), (value,), (value,))


def test_a_non_finite_weight_trains_to_nan_and_never_raises() -> None:
    layer = make_layer(3)
    layer.weight[2, 2] = torch.inf
    for config in CONFIGS:
        for op in (native.bitlinear_train, native.torch_bitlinear_train):
            y = op(layer.x, layer.weight, None, *config.operator_arguments())[0]
            expected = torch.zeros(3, 19, dtype=torch.bool)
            expected[:, slice(None) if config.weight_granularity == "per_tensor" else 2] = True
            assert torch.equal(y.isnan(), expected)
