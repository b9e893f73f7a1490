"""Many Python threads on the same weights, as nn.DataParallel runs its replicas: the bits of one thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.ops import bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, deploy
from core_helpers import CONFIGS, PER_TOKEN, id_of
from support import torch_threads

pytestmark = pytest.mark.medium
all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
THREADS, REPEATS = 6, 4
Result = TypeVar("Result")


def make_model(config: BitQuantConfig, state: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(37, 64, quant_config=config), nn.ReLU(), BitLinear(64, 19, quant_config=config))
    model.train(state == "training")
    return deploy(model) if state == "deployed" else model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 37, generator=generator) for rows in (0, 1, 5, 16, 33, 64) for _ in range(2)]


def at_once(work: Callable[[int], Result]) -> list[list[Result]]:
    """work(0), work(1), ... in threads that start together, each several times."""
    start = threading.Barrier(THREADS)

    def run(thread: int) -> list[Result]:
        start.wait()
        return [work((thread + i) % len(batches())) for i in range(REPEATS * len(batches()))]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every parameter."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])]


def check(model_of_thread: Callable[[], nn.Module], expected: list[list[Tensor]], *, gradients: bool) -> None:
    inputs = batches()

    def work(index: int) -> tuple[int, list[Tensor]]:
        model = model_of_thread()
        if gradients:
            return index, step(model, inputs[index])
        with torch.no_grad():
            return index, [model(inputs[index])]

    for results in at_once(work):
        for index, found in results:
            for ours, alone in zip(found, expected[index], strict=not gradients or len(found) == len(expected[index])):
                assert_same_bits(ours, alone)


@pytest.mark.parametrize("threads_of_torch", [1, 2])
@pytest.mark.parametrize("state", ["training", "evaluation", "deployed"])
@pytest.mark.parametrize("config", CONFIGS[:1] + CONFIGS[-1:] + (PER_TOKEN,), ids=id_of)
def test_threads_share_a_model(config: BitQuantConfig, state: str, threads_of_torch: int) -> None:
    """Forward and backward at once; in evaluation the threads also race for the packed copy."""
    with torch_threads(threads_of_torch):
        alone = [step(make_model(config, state), x) for x in batches()]
        model = make_model(config, state)
        check(lambda: model, alone, gradients=True)
        fresh = make_model(config, state)
        check(lambda: fresh, [[results[0]] for results in alone], gradients=False)


@all_configs
def test_replicas_share_their_parameters(config: BitQuantConfig) -> None:
    """As DataParallel replicates a module: new modules around the same tensors, gradients summed into them."""
    model = make_model(config, "training")
    inputs = batches()
    for x in inputs:
        model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()

    def replica() -> nn.Module:
        memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
        return copy.deepcopy(model, memo)

    replicas = [replica() for _ in inputs]
    assert replicas[0] is not model
    assert next(replicas[0].parameters()) is next(model.parameters())
    with ThreadPoolExecutor(THREADS) as pool:
        outputs = list(pool.map(lambda pair: pair[0](pair[1]), zip(replicas, inputs, strict=True)))
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@all_configs
def test_threads_call_the_operators_with_their_own_autocast_and_grad_mode(config: BitQuantConfig) -> None:
    """Both belong to a thread: one that enters them changes nothing for the others."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(19, 37), batches()
    scale, qweight = bitlinear.prepare_weights(weight, config)
    wide = [bitlinear.forward(x, None, scale, qweight, None, config) for x in inputs]

    def work(index: int) -> tuple[int, Tensor, Tensor]:
        x = inputs[index].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index % 2 == 1), torch.set_grad_enabled(index % 3 > 0):
            return (
                index,
                bitlinear.forward(x, None, scale, qweight, None, config),
                bitlinear.forward(x, weight, quant_config=config, training=True),
            )

    for results in at_once(work):
        for index, inferred, trained in results:
            expected = wide[index].to(torch.bfloat16) if index % 2 == 1 else wide[index]
            for y in (inferred, trained):
                assert y.requires_grad == (index % 3 > 0)
                assert_same_bits(y.detach(), expected)


def test_threads_prepare_weights_at_once() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(65, 130) for _ in batches()]
    alone = [bitlinear.prepare_weights(weight, PER_TOKEN) for weight in weights]
    for results in at_once(lambda index: (index, bitlinear.prepare_weights(weights[index], PER_TOKEN))):
        for index, (scale, qweight) in results:
            assert_same_bits(scale, alone[index][0])
            assert torch.equal(qweight, alone[index][1])
