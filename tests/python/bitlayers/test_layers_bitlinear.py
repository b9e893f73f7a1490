"""BitLinear: construction, the values of its states, deployment."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear
from bitlayers import BitLinear
from core_helpers import CONFIGS, id_of
from layer_helpers import (
    PER_CHANNEL,
    SIZES,
    STATES,
    buffers_of,
    evaluate,
    layer_in,
    make_layer,
)
from support import same_bits
from user_kernels import OwnForm, registered

# --- construction -----------------------------------------------------------------------------------------------------


def test_is_an_nn_linear_with_its_initial_values() -> None:
    layer = make_layer()
    torch.manual_seed(0)
    linear = nn.Linear(*SIZES)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    assert layer.quant_config == BitQuantConfig()
    assert not layer.is_deployed
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert BitLinear(*SIZES, bias=False).bias is None


def test_init_methods() -> None:
    names = ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "normal", "orthogonal"]
    weights = [make_layer(init_method=name).weight for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert torch.equal(make_layer(init_method=nn.init.ones_).weight, torch.ones(19, 37))
    with pytest.raises(QuantizationError, match="Unknown initialization method.*nonsense"):
        make_layer(init_method="nonsense")


def test_repr_tells_the_schema_and_the_state() -> None:
    layer = make_layer(PER_CHANNEL)
    assert "ternary per_channel, activations=int8 per_channel" in repr(layer)
    assert "deployed" not in repr(layer)
    assert "deployed" in repr(layer.deploy())
    assert "activations=float32" in repr(make_layer(BitQuantConfig(activation_dtype="float32")))


def test_odd_but_legal_arguments_of_the_constructor() -> None:
    layer = BitLinear(np.int64(6), torch.Size([3])[0], 1, dtype=torch.bfloat16, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert (type(layer.in_features), layer.in_features, layer.out_features) == (int, 6, 3)
    assert layer.bias is not None
    assert BitLinear(1, 1, False)(torch.ones(1)).shape == (1,)
    assert BitLinear(2**24 - 1, 1, device="meta").weight.shape == (1, 2**24 - 1)


def test_a_default_dtype_that_no_layer_supports() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(QuantizationError, match=r"default dtype is torch\.float64.*give the layer a dtype"):
            BitLinear(4, 4)
        layer = BitLinear(4, 4, dtype=torch.float32)
        assert layer(torch.ones(2, 4, dtype=torch.float32)).dtype == torch.float32
        deployed = layer.deploy()
        assert deployed.qweight_scale is not None
        assert deployed.qweight_scale.dtype == torch.float32
        BitLinear(4, 4, dtype=torch.float32).load_state_dict(deployed.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_evaluation_and_deployment_agree(config: BitQuantConfig, dtype: torch.dtype, x: Tensor) -> None:
    layer, x = make_layer(config, dtype=dtype), x.to(dtype)
    trained = layer(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    with_gradients = layer(x)
    deployed = layer.deploy()(x)
    assert trained.dtype == dtype
    assert same_bits(evaluated, with_gradients)
    assert same_bits(evaluated, deployed)
    if config.activation_dtype == "int8":
        assert same_bits(evaluated, trained)
    else:
        torch.testing.assert_close(evaluated, trained)


@pytest.mark.parametrize("shape", [(37,), (0, 37), (2, 3, 37), (1, 37)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = make_layer(PER_CHANNEL)
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 19)
    assert same_bits(layer.eval()(x), layer.deploy()(x))


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_evaluation_gives_the_gradients_of_training(config: BitQuantConfig, x: Tensor) -> None:
    gradients = []
    dy = torch.randn(5, 19)
    layer = make_layer(config)
    for mode in (True, False):
        layer.train(mode).zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        assert layer.bias is not None
        gradients.append((leaf.grad, layer.weight.grad, layer.bias.grad))
    for trained, evaluated in zip(*gradients, strict=True):
        assert trained is not None
        assert evaluated is not None
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-5 * float(trained.abs().max()))


def test_evaluation_has_no_second_derivative(x: Tensor) -> None:
    layer = make_layer().eval()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_evaluation_on_the_meta_device_has_a_backward(config: BitQuantConfig) -> None:
    layer = make_layer(config, device="meta").eval()
    layer(torch.empty(5, SIZES[0], device="meta")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (19, 37)


@pytest.mark.parametrize("state", STATES)
def test_a_frozen_layer_passes_the_same_gradient_on(state: str, x: Tensor) -> None:
    gradients = []
    for frozen in (False, True):
        layer = layer_in(state).requires_grad_(not frozen)
        leaf = x.clone().requires_grad_()
        layer(leaf).pow(2).sum().backward()
        gradients.append(leaf.grad)
        assert all((parameter.grad is None) == frozen for parameter in layer.parameters())
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_layers_give_the_same_bits(in_place: bool, x: Tensor) -> None:
    layer = make_layer(PER_CHANNEL)
    expected = layer(x).detach()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if in_place:
        layer.compile(backend="aot_eager", fullgraph=True)
        compiled = layer
    assert same_bits(compiled(x).detach(), expected)
    with torch.no_grad():
        layer.eval()
        assert same_bits(compiled(x), expected)
        layer.weight.neg_()
        assert same_bits(compiled(x), evaluate(layer, x))
        layer.weight.neg_()
        layer.deploy()
        assert same_bits(compiled(x), expected)


class OwnFormDoubled(OwnForm):
    """Doubles y so that it shows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


@torch.no_grad()
def test_a_registered_kernel_serves_a_layer_until_it_goes(x: Tensor) -> None:
    layer = make_layer().eval()
    before = layer(x)
    with registered(OwnFormDoubled):
        torch.testing.assert_close(layer(x), 2 * before)
        deployed = copy.deepcopy(layer).deploy()
        assert buffers_of(deployed)[1].dtype == torch.uint8
        assert same_bits(deployed(x), before)
    assert same_bits(layer(x), before)


# --- deployment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_deploy_leaves_packed_weights_only(config: BitQuantConfig) -> None:
    layer = make_layer(config)
    expected = bitlinear.prepare_weights(layer.weight.detach(), config)
    assert layer.deploy() is layer
    scale, qweight = buffers_of(layer)
    assert layer.is_deployed
    assert not layer.training
    assert layer._parameters["weight"] is None
    assert set(layer.state_dict()) == {"qweight", "qweight_scale", "bias"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert torch.equal(scale, expected[0])
    assert torch.equal(qweight, expected[1])


def test_a_deployed_layer_computes_the_same_in_training_mode(x: Tensor) -> None:
    layer = make_layer().deploy()
    x = x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.sum(), (x, layer.bias))
    nn.Sequential(layer).train()
    assert layer.training
    assert layer.is_deployed
    y_in_training = layer(x)
    assert same_bits(y_in_training, y)
    for gradient, expected in zip(torch.autograd.grad(y_in_training.sum(), (x, layer.bias)), gradients, strict=True):
        assert same_bits(gradient, expected)
    nn.Sequential(layer).eval()
    assert not layer.training


@pytest.mark.parametrize("way", ["deploy", "load"])
def test_a_layer_deployed_in_inference_mode_passes_gradients_on(way: str, x: Tensor) -> None:
    layer, state = make_layer(), make_layer().deploy().state_dict()
    with torch.inference_mode():
        layer.deploy() if way == "deploy" else layer.load_state_dict(state)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
