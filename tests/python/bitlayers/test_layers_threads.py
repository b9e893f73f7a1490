"""BitLinear in threads: one changes the weight while others evaluate or pack it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.ops import bitlinear
from layer_helpers import (
    SIZES,
    evaluate,
    layer_in,
    noise,
)
from support import same_bits


def run_threads(*work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(task: Callable[[], object]) -> None:
        try:
            with torch.no_grad():
                task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


@pytest.mark.parametrize("moment", ["before", "after"])
@torch.no_grad()
def test_a_change_while_another_thread_packs_outdates_the_copy(
    moment: str, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    """The change falls between the look at the weight's version and the storing of the copy."""
    layer = layer_in("training").eval()
    original = bitlinear.prepare_weights
    calls = list[str]()

    def prepare(weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        calls.append(moment)
        if moment == "before":
            run_threads(lambda: layer.weight.copy_(noise()))
        prepared = original(weight, *args)
        if moment == "after":
            run_threads(lambda: layer.weight.copy_(noise()))
        return prepared

    monkeypatch.setattr(bitlinear, "prepare_weights", prepare)
    layer(x)
    monkeypatch.setattr(bitlinear, "prepare_weights", original)
    assert calls == [moment]
    assert same_bits(layer(x), evaluate(layer, x))


def test_forwards_beside_changes_in_place(x: Tensor) -> None:
    """While the weight changes a result may mix old and new values; afterwards it is the new one."""
    layer = layer_in("evaluated")
    done = threading.Event()

    def change() -> None:
        for step in range(60):
            layer.weight.copy_(noise(step))
        done.set()

    def compute() -> None:
        while not done.is_set():
            y = layer(x)
            assert y.shape == (5, SIZES[1])
            assert torch.isfinite(y).all()

    run_threads(change, compute, compute)
    with torch.no_grad():
        assert same_bits(layer(x), evaluate(layer, x))


def test_forwards_beside_replacements_see_one_weight_or_the_other(x: Tensor) -> None:
    layer = layer_in("evaluated")
    weights = [nn.Parameter(noise(seed)) for seed in range(2)]
    expected = []
    for weight in weights:
        layer.weight = weight
        expected.append(evaluate(layer, x))
    done = threading.Event()

    def replace() -> None:
        for step in range(300):
            layer.weight = weights[step % 2]
        done.set()

    def compute() -> None:
        while not done.is_set():
            y = layer(x)
            assert any(same_bits(y, each) for each in expected)

    run_threads(replace, compute, compute)
