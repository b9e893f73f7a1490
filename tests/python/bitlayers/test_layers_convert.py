"""From nn.Linear to BitLinear, and a whole model's deployment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError, StateError
from bitlayers import BitLinear, convert, deploy
from support import same_bits

CONFIG = BitQuantConfig("per_channel", "int8", "per_channel")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.again = self.first
        self.body = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.body(self.again(self.first(x))))
        return output


def test_from_linear_shares_the_parameters() -> None:
    linear = nn.Linear(5, 3, dtype=torch.bfloat16).eval()
    layer = BitLinear.from_linear(linear, CONFIG)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.quant_config == CONFIG
    assert not layer.training
    assert BitLinear.from_linear(nn.Linear(5, 3, bias=False)).bias is None


def test_convert_replaces_plain_linears_only() -> None:
    model = Block()
    parameters = dict(model.named_parameters())
    assert convert(model, CONFIG, skip=["head"]) is model
    assert isinstance(model.first, BitLinear)
    assert model.again is model.first
    assert isinstance(model.body[0], BitLinear)
    assert type(model.head) is nn.Linear
    assert not isinstance(model.attention.out_proj, BitLinear)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_convert_of_a_single_layer_and_of_an_unknown_name() -> None:
    assert isinstance(convert(nn.Linear(2, 2)), BitLinear)
    with pytest.raises(QuantizationError, match="tail"):
        convert(Block(), skip=["tail"])


def test_deploy_of_a_model() -> None:
    x = torch.randn(3, 8)
    model = convert(Block(), CONFIG)
    expected = model.eval()(x)
    assert same_bits(deploy(model)(x), expected)
    with pytest.raises(StateError, match="deployed already"):
        deploy(model)
    with pytest.raises(QuantizationError, match="no BitLinear"):
        deploy(nn.ReLU())


def test_deploy_is_all_or_nothing() -> None:
    model = convert(Block(), CONFIG)
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="head"):
        deploy(model)
    assert not any(layer.is_deployed for layer in model.modules() if isinstance(layer, BitLinear))
    assert model.training


# --- layers that cannot be replaced ---------------------------------------------------------------------------------


def weight_norm(layer: nn.Linear) -> None:
    nn.utils.weight_norm(layer)


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=1)


def pruned_bias(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "bias", amount=1)


def forward_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda *_: None)


def backward_hook(layer: nn.Linear) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def state_dict_hook(layer: nn.Linear) -> None:
    layer.register_state_dict_post_hook(lambda *_: None)


def double(layer: nn.Linear) -> None:
    layer.double()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change", [weight_norm, pruned, pruned_bias, forward_hook, backward_hook, state_dict_hook, double]
)
def test_convert_is_all_or_nothing(change: Callable[[nn.Linear], None]) -> None:
    model = Block()
    change(model.head)
    with pytest.raises(QuantizationError, match=r"^head: "):
        convert(model, CONFIG)
    assert not any(isinstance(module, BitLinear) for module in model.modules())
    assert isinstance(convert(model, CONFIG, skip=["head"]).get_submodule("body.0"), BitLinear)


# --- torch's encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_converted_encoder_computes_with_its_layers(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 16)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    original = encoder.eval()(x, src_key_padding_mask=mask)
    model = convert(encoder.train(), CONFIG)
    expected = model(x, src_key_padding_mask=mask)  # Training mode has no fast path.
    evaluated = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated, expected)
    assert same_bits(deploy(model)(x, src_key_padding_mask=mask), evaluated)
    assert not torch.allclose(evaluated[~mask], original[~mask], atol=1e-3)


@torch.no_grad()
def test_an_encoder_that_was_left_alone_keeps_its_fast_path() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 4))
    encoder = convert(model, skip=["0"]).get_submodule("0")
    assert encoder.activation_relu_or_gelu == 1
