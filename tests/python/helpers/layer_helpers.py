"""What the tests of BitLinear share: a small layer in each of its states, and what it has to return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.ops import bitlinear
from bitlayers import BitLinear

PER_CHANNEL = BitQuantConfig("per_channel", "int8", "per_channel")
SIZES = (37, 19)  # in, out: no multiple of a block.
STATES = ("training", "evaluated", "deployed")
"""Trainable in training mode; trainable in evaluation mode, with a packed copy; deployed."""
TRAINABLE = STATES[:2]


def make_x(rows: int = 5) -> Tensor:
    return torch.randn(rows, SIZES[0], generator=torch.Generator().manual_seed(1))


def make_layer(config: BitQuantConfig | None = None, **kwargs: object) -> BitLinear:
    torch.manual_seed(0)
    return BitLinear(*SIZES, quant_config=config, **kwargs)  # type: ignore[arg-type]


def layer_in(state: str, **kwargs: object) -> BitLinear:
    """A layer of per_channel scales in one of `STATES`."""
    return put_into(state, make_layer(PER_CHANNEL, **kwargs))


def put_into(state: str, layer: BitLinear) -> BitLinear:
    if state == "evaluated":
        with torch.no_grad():
            layer.eval()(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    if state == "deployed":
        layer.deploy()
    return layer


def evaluate(layer: BitLinear, x: Tensor) -> Tensor:
    """The output of inference mode, from an untouched copy of what the layer holds."""
    with torch.no_grad():
        scale, qweight = layer.qweight_scale, layer.qweight
        if scale is None or qweight is None:
            scale, qweight = bitlinear.prepare_weights(layer.weight.detach().clone(), layer.quant_config)
        return bitlinear.forward(x, None, scale, qweight, layer.bias, layer.quant_config)


def buffers_of(layer: BitLinear) -> tuple[Tensor, Tensor]:
    assert layer.qweight_scale is not None
    assert layer.qweight is not None
    return layer.qweight_scale, layer.qweight


def noise(seed: int = 3) -> Tensor:
    return torch.randn(SIZES[1], SIZES[0], generator=torch.Generator().manual_seed(seed))


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_holds(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
