"""Layers and models whose weights have scales per group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.testing import assert_same_bits
from bitlab.demo.program import run_program
from bitlayers import BitLinear, convert, deploy
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel
from layer_helpers import assert_holds, buffers_of, evaluate, make_layer, make_x, snapshot

GROUPS = BitQuantConfig("per_group", "int8", "per_group", 32)


def deployed() -> BitLinear:
    return make_layer(GROUPS).deploy()


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double, lambda layer: layer.to(torch.bfloat16)],
    ids=["half", "bfloat16", "float", "double", "to"],
)
def test_a_scale_stays_float16(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = deployed()
    scale, _ = buffers_of(layer)
    before = scale.clone()
    cast(layer)
    found, _ = buffers_of(layer)
    assert found.dtype == torch.float16
    assert torch.equal(found, before)


def test_a_state_goes_round(tmp_path: Path) -> None:
    layer, other = deployed(), make_layer(GROUPS)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        other.weight.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.is_deployed
    assert_holds(other, snapshot(layer))
    assert_same_bits(other(make_x()), evaluate(layer, make_x()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.float(), ("float32", "float16")),
        (lambda s: s[:, :1], ("(19, 1)", "(19, 2)", "group_size=32")),
        (lambda s: s.reshape(-1), ("(38,)", "(19, 2)")),
        (lambda s: s * 0, ("finite and positive",)),
        (lambda s: s * torch.nan, ("finite and positive",)),
        (lambda s: -s, ("finite and positive",)),
    ],
)
def test_scales_that_do_not_fit(change: Any, words: tuple[str, ...]) -> None:
    layer, target = deployed(), make_layer(GROUPS)
    before, state = snapshot(target), layer.state_dict()
    state["qweight_scale"] = change(state["qweight_scale"])
    with pytest.raises(QuantizationError, match="qweight_scale") as caught:
        target.load_state_dict(state)
    assert all(word in str(caught.value) for word in words)
    assert_holds(target, before)


def test_a_state_of_another_group_size() -> None:
    with pytest.raises(QuantizationError, match=r"\(19, 2\).*\(19, 1\).*group_size=64"):
        make_layer(BitQuantConfig("per_group", group_size=64)).load_state_dict(deployed().state_dict())


def test_it_says_what_it_is() -> None:
    assert "weight=ternary per_group of 32, activations=int8 per_group" in repr(make_layer(GROUPS))


def test_a_converted_model_trains_and_is_deployed() -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(70, 40), nn.GELU(), nn.Linear(40, 3)), GROUPS)
    x, labels = torch.randn(64, 70), torch.randint(3, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    trained = model(x).detach()
    assert_same_bits(model.eval()(x).detach(), trained)
    assert_same_bits(deploy(model)(x).detach(), trained)


def configs_of(model: BitMLPModel) -> list[BitQuantConfig]:
    return [layer.quant_config for layer in model.layers if isinstance(layer, BitLinear)]


@pytest.mark.parametrize("state", ["trainable", "deployed"])
@pytest.mark.parametrize(
    "configs",
    [
        [GROUPS] * 4,
        [GROUPS, BitQuantConfig(), BitQuantConfig("per_group"), BitQuantConfig("per_group", "float32", group_size=256)],
        [BitQuantConfig("per_channel"), GROUPS, BitQuantConfig("per_group", group_size=64), BitQuantConfig()],
    ],
    ids=["one", "of its own", "some"],
)
def test_a_saved_model_with_groups(configs: list[BitQuantConfig], state: str, tmp_path: Path) -> None:
    """In Python and by the C++ program, which knows the config by the file's metadata and by config.json."""
    torch.manual_seed(0)
    model = BitMLPModel(BitMLPConfig(4, 150, 70, 9), configs[0]).eval()
    for layer, config in zip(model.layers, configs, strict=True):
        layer.quant_config = config  # type: ignore[assignment]
    if state == "deployed":
        model.deploy()
    model.save_pretrained(tmp_path)
    loaded = AutoBitModel.from_pretrained(tmp_path)
    assert isinstance(loaded, BitMLPModel)
    assert configs_of(loaded) == configs
    x: Tensor = torch.randn(5, 150)
    with torch.no_grad():
        expected = model(x)
        assert_same_bits(loaded(x), expected)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same_bits(run_program(path, x, tmp_path)[0], expected)


def test_numbers_as_other_writers_write_them(tmp_path: Path) -> None:
    model = BitMLPModel(BitMLPConfig(2, 70, 20, 3), GROUPS).eval().deploy()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"group_size": 32', '"group_size": 32.0'))
    x = torch.randn(2, 70)
    with torch.no_grad():
        expected = model(x)
        assert_same_bits(AutoBitModel.from_pretrained(tmp_path)(x), expected)
    assert_same_bits(run_program(tmp_path, x, tmp_path)[0], expected)
