"""Adapters of PEFT on ternary layers: they train on packed weights, or one sentence says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from bitcore.exceptions import StateError
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, convert, deploy

pytestmark = pytest.mark.medium  # Importing PEFT takes seconds.

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
TARGETS = ["0", "2"]


def deployed() -> nn.Module:
    torch.manual_seed(0)
    return deploy(convert(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))))


def adapted(**options: Any) -> Any:
    return peft.get_peft_model(deployed(), peft.LoraConfig(r=4, target_modules=TARGETS, **options))


def step(model: nn.Module, lr: float = 0.05) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    optimizer.zero_grad()
    loss = (model(X) - X[:, :4]).pow(2).mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def packed(model: nn.Module) -> list[Tensor]:
    return [module.qweight.clone() for module in model.modules() if isinstance(module, BitLinear)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}],
    ids=["lora", "rslora", "gaussian", "dropout"],
)
def test_adapters_train_on_packed_weights(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before = packed(model)
    losses = [step(model) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    for now, then in zip(packed(model), before, strict=True):
        assert torch.equal(now, then)


def test_adapters_are_saved_and_taken_off(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        assert_same_bits(model(X), deployed()(X))  # B is zero at first.
    step(model)
    assert not [name for name in peft.get_peft_model_state_dict(model) if "qweight" in name]
    with torch.no_grad(), model.disable_adapter():
        assert_same_bits(model(X), deployed()(X))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(deployed(), str(tmp_path))
    with torch.no_grad():
        assert_same_bits(again.eval()(X), model.eval()(X))
        assert_same_bits(model.unload()(X), deployed()(X))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()},
    ],
    ids=str,
)
def test_adapters_that_need_a_float_weight_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=r"PEFT's \w+\(\) computes with the float weight of a layer that is deployed"):
        adapted(**options)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_into_packed_weights_is_refused(merge: str) -> None:
    model = adapted()
    before = packed(model)
    with pytest.raises(StateError, match=r"PEFT's merge\(\) .* not merged"):
        getattr(model, merge)()
    for now, then in zip(packed(model), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_trainable_layers_have_the_weight_that_adapters_read(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = convert(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **options))
    losses = [step(model) for _ in range(20)]
    assert losses[-1] < losses[0]
