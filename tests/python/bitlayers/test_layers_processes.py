"""BitLinear in other processes: workers of a DataLoader, processes that are given a layer, shared memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitlayers import BitLinear
from layer_helpers import STATES, evaluate, layer_in, make_x
from support import same_bits

pytestmark = pytest.mark.medium
TIMEOUT_S = 600


class Outputs(Dataset[Tensor]):
    """The output of a layer for each row, computed where the row is fetched."""

    def __init__(self, layer: BitLinear, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.layer(self.x[index])


def answer(layer: BitLinear, x: Tensor, queue: Any) -> None:
    """What a process does with a layer that it is given: its output, as numbers, not as shared memory."""
    torch.set_num_threads(1)  # As in torch's own workers: a forked process must not use its parent's OpenMP threads.
    with torch.no_grad():
        queue.put((layer(x).tolist(), layer.training, layer.is_deployed))


def negate(layer: BitLinear, x: Tensor, queue: Any) -> None:
    """Changes a weight in shared memory, and answers."""
    torch.set_num_threads(1)
    with torch.no_grad():
        layer.weight.neg_()
    answer(layer.train(), x, queue)


def in_process(way: str, work: Callable[..., None], layer: BitLinear, x: Tensor) -> tuple[Tensor, bool, bool]:
    context: Any = torch.multiprocessing.get_context(way)
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(layer, x, queue))
    process.start()
    process.join(TIMEOUT_S)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive, f"still running after {TIMEOUT_S} s"
    assert process.exitcode == 0
    values, training, deployed = queue.get()
    return torch.tensor(values), training, deployed


ways = pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            marks=pytest.mark.skipif(
                way not in multiprocessing.get_all_start_methods(), reason=f"this platform cannot {way}"
            ),
        )
        for way in ("fork", "spawn")
    ],
)


@ways
@torch.no_grad()
def test_workers_of_a_loader(way: str) -> None:
    x = make_x(6)
    for state in ("evaluated", "deployed") if way == "fork" else ("deployed",):
        layer = layer_in(state)
        expected = layer(x)
        workers = 2 if way == "fork" else 1
        loader = DataLoader(Outputs(layer, x), 2, num_workers=workers, multiprocessing_context=way, timeout=TIMEOUT_S)
        assert same_bits(torch.cat(list(loader)), expected)
        assert same_bits(layer(x), expected)


@ways
@torch.no_grad()
def test_a_process_that_is_given_a_layer(way: str) -> None:
    x = make_x()
    for state in STATES if way == "fork" else ("deployed",):
        layer = layer_in(state)
        y, training, deployed = in_process(way, answer, layer, x)
        assert same_bits(y, evaluate(layer, x))
        assert (training, deployed) == (layer.training, layer.is_deployed)


@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_shared_memory_changes_no_bit(state: str) -> None:
    layer, x = layer_in(state), make_x()
    expected = layer(x)
    assert layer.share_memory() is layer
    assert all(tensor.is_shared() for tensor in layer.state_dict().values())
    assert same_bits(layer(x), expected)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this platform cannot fork")
@pytest.mark.parametrize("state", ["training", "evaluated"])
@torch.no_grad()
def test_a_change_by_another_process_shows_after_train(state: str) -> None:
    layer, x = layer_in(state), make_x()
    before = layer.weight.clone()
    layer.share_memory()
    theirs, _, _ = in_process("fork", negate, layer, x)
    assert torch.equal(layer.weight, -before)
    assert same_bits(layer.train()(x), theirs)
    assert same_bits(layer.eval()(x), theirs)
    assert same_bits(layer(x), evaluate(layer, x))
