"""The straight-through gradients: values, who gets them, dtypes, second derivatives."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitcore.operators import native, torch_ops
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear
from core_helpers import CONFIGS, DTYPES, PER_TOKEN, Layer, id_of, make_layer

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)


def _leaves(layer: Layer) -> Layer:
    return Layer(*(tensor.detach().clone().requires_grad_() for tensor in layer))


def _close(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == expected.shape
    assert (ours.double() - expected.double()).abs().max() <= relative * expected.double().abs().max()


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    layer = make_layer(4)
    weight = layer.weight.clone().requires_grad_()
    y = bitlinear.forward(layer.x, weight, quant_config=PER_TOKEN, training=True)
    y.sum().backward()
    assert layer.x.grad is None
    assert weight.grad is not None
    assert not bitlinear.forward(layer.x, layer.weight, quant_config=PER_TOKEN, training=True).requires_grad
    with torch.no_grad():
        assert not bitlinear.forward(layer.x, weight, quant_config=PER_TOKEN, training=True).requires_grad


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
    assert not floats
    assert sum(t.nbytes for t in saved if t.dtype == torch.uint8) == 64 * (16 + 1)


def test_backward_inside_and_outside_of_autocast_is_the_same() -> None:
    """The dtype of dY decides how it is multiplied, not the autocast that may be on when it arrives."""
    gradients = []
    for inside in (False, True):
        layer = _leaves(make_layer(4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = bitlinear.forward(layer.x, layer.weight, quant_config=PER_TOKEN, training=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.backward(torch.ones_like(y))
        assert layer.x.grad is not None
        assert layer.weight.grad is not None
        gradients.append((layer.x.grad, layer.weight.grad))
    for inside_gradient, outside_gradient in zip(*gradients, strict=True):
        assert_same_bits(inside_gradient, outside_gradient)


def test_a_float32_gradient_is_multiplied_in_float32_also_inside_autocast() -> None:
    gradients = []
    for enabled in (False, True):
        layer = _leaves(make_layer(4))
        y = bitlinear.forward(layer.x, layer.weight, quant_config=PER_TOKEN, training=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.sum().backward()
        assert layer.x.grad is not None
        gradients.append(layer.x.grad)
    assert_same_bits(gradients[1], gradients[0])


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
    _, qx, x_scale, qweight, scale = native.bitlinear_train(x, weight, None, *config.flags)
    int8 = config.activation_dtype == "int8"
    kept, kept_scale = (qx, x_scale) if int8 else (x, None)
    wide_x = qx.double() * x_scale.double() if int8 else x.double()
    wide_weight = base.dequantize_weight(base.unpack_weights(qweight, in_features), scale, config).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for dy in (
        torch.randn(rows, out_features, generator=generator).to(dtype),
        torch.ones((), dtype=dtype).expand(rows, 1),
    ):
        dy = dy.expand(rows, out_features)
        arguments = (dy, kept, kept_scale, qweight, scale, in_features, config.flags[0])
        expected = (dy.double() @ wide_weight, dy.double().T @ wide_x, dy.double().sum(0))
        for dtypes in ((torch.float32,) * 3, (dtype,) * 3, (torch.float32, None, dtype), (None, dtype, None)):
            found = native.bitlinear_backward(*arguments, *dtypes)
            plain = torch_ops.bitlinear_backward(*arguments, *dtypes)
            for gradient, same, reference, wanted in zip(found, plain, expected, dtypes, strict=True):
                if wanted is None:
                    assert gradient.numel() == same.numel() == 0
                    continue
                assert gradient.dtype == same.dtype == wanted
                _close(gradient, reference, tolerance)
                _close(same, reference, tolerance)
            # The floating weight that was quantized serves as well as its codes.
            from_weight = native.bitlinear_backward(*arguments[:3], weight, *arguments[4:], *dtypes)
            for gradient, same in zip(found, from_weight, strict=True):
                assert_same_bits(gradient, same)
            plain_from_weight = torch_ops.bitlinear_backward(*arguments[:3], weight, *arguments[4:], *dtypes)
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


@all_configs
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


def test_a_changed_parameter_is_noticed() -> None:
    """Backward needs the weight of the forward: as torch's own layers, it refuses another one."""
    layer = BitLinear(8, 4)
    y = layer(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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


@all_configs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_quantization(config: BitQuantConfig, dtype: torch.dtype) -> None:
    layer = make_layer(3, 2, dtype=dtype)
    x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    fake_weight, fake_x = base.fake_quantize_weight(weight, config), base.fake_quantize_x(x, config)
    scale = base.compute_weight_scale(weight, config)
    codes = base.quantize_weight(weight, scale, config)
    assert_same_bits(fake_weight.detach(), base.dequantize_weight(codes, scale, config))
    if config.activation_dtype == "int8":
        x_scale = base.compute_x_scale(x, config)
        qx = base.quantize_x(x, x_scale, config)
        assert_same_bits(fake_x.detach(), base.dequantize_x(qx, x_scale, config))
    else:
        assert fake_x is x
        x_scale = base.compute_x_scale(x, config)
        assert base.quantize_x(layer.x, x_scale, config) is layer.x
        qx = base.quantize_x(x, x_scale, config)
        assert qx.data_ptr() == x.data_ptr()
        assert not qx.requires_grad
        assert not base.dequantize_x(x, x_scale, config).requires_grad
    upstream = torch.randn(19, 37)
    (gradient,) = torch.autograd.grad(fake_weight, weight, upstream)
    assert_same_bits(gradient, upstream.to(dtype))
    assert not scale.requires_grad
    assert not codes.requires_grad


def test_a_non_finite_weight_trains_to_nan_and_never_raises() -> None:
    layer = make_layer(3)
    layer.weight[2, 2] = torch.inf
    for config in CONFIGS:
        for op in (native.bitlinear_train, native.torch_bitlinear_train):
            y = op(layer.x, layer.weight, None, *config.flags)[0]
            expected = torch.zeros(3, 19, dtype=torch.bool)
            expected[:, 2 if config.weight_granularity == "per_channel" else slice(None)] = True
            assert torch.equal(y.isnan(), expected)
