"""Low-rank adapters (LoRA) on deployed layers: they train, the packed weights under them stay as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, deploy
from core_helpers import CONFIGS, PER_TOKEN, id_of

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)


class Lora(nn.Module):
    """y = base(x) + B A x, with B zero at first."""

    def __init__(self, base: BitLinear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def deployed_network(config: BitQuantConfig) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(BitLinear(16, 32, quant_config=config), nn.ReLU(), BitLinear(32, 4, quant_config=config))
    return deploy(network).requires_grad_(False)  # type: ignore[return-value]


def with_adapters(network: nn.Sequential) -> nn.Sequential:
    adapted = nn.Sequential(*(Lora(layer) if isinstance(layer, BitLinear) else layer for layer in network))
    adapted.eval()
    return adapted


def task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=generator)
    return x, torch.tanh(x @ torch.randn(16, 4, generator=generator))


def train(model: nn.Module, steps: int = 60, *, autocast: bool = False) -> list[float]:
    x, target = task()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        loss = (y - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "qweight" in name or "bias" in name}


@pytest.mark.usefixtures("one_thread")
@all_configs
def test_adapters_train_and_the_packed_weights_stay(config: BitQuantConfig) -> None:
    network = deployed_network(config)
    model, x = with_adapters(network), task()[0]
    assert_same_bits(model(x).detach(), network(x))
    before = packed_state(model)
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    after = packed_state(model)
    assert before.keys() == after.keys()
    assert len(before) == 6
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_deployed_layers_bias_may_train_too() -> None:
    layer = BitLinear(16, 4, quant_config=PER_TOKEN).deploy()
    before = packed_state(layer)
    losses = train(layer)
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.bias, before["bias"])
    assert torch.equal(layer.state_dict()["qweight"], before["qweight"])


def test_adapters_train_under_autocast_and_compiled() -> None:
    model = with_adapters(deployed_network(PER_TOKEN))
    losses = train(model, steps=30, autocast=True)
    assert losses[-1] < 0.7 * losses[0]
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = train(compiled, steps=30)
    assert math.isfinite(again[-1])
    assert again[-1] < losses[-1]
