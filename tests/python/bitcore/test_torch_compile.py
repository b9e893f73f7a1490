"""torch.compile(fullgraph=True) with inductor: whole networks, all states and configs, dynamic batches, autocast.

Outputs are equal to eager mode to the bit. So are gradients, but for the biases': inductor sums in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from bitcore.config import BitQuantConfig
from bitcore.operators import native
from bitcore.ops import bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, deploy
from core_helpers import CONFIGS, PER_TOKEN, id_of, make_layer

pytestmark = pytest.mark.medium

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
ROWS = (7, 2, 33, 5, 64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Without torch's cache of traced graphs on disk: its keys do not tell how an operator's gradient was written."""
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def make_model(config: BitQuantConfig = PER_TOKEN) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        BitLinear(37, 24, quant_config=config),
        nn.ReLU(),
        BitLinear(24, 5, bias=False, quant_config=config),
    )


def batch(rows: int) -> Tensor:
    return torch.randn(rows, 37, generator=torch.Generator().manual_seed(rows))


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradients of x and of every parameter that asks for one."""
    leaf = x.clone().requires_grad_()
    leaves: dict[str, Tensor] = {"x": leaf, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    y = run(leaf)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def assert_same_step(compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    expected_y, expected = step(model, model, x)
    y, gradients = step(compiled, model, x)
    assert_same_bits(y, expected_y)
    for name, gradient in gradients.items():
        if "bias" in name:  # inductor sums in an order of its own
            tolerance = 2e-6
        elif y.dtype == torch.bfloat16:  # and leaves out the rounding of a product to bfloat16 that it widens again
            tolerance = 2 * torch.finfo(torch.bfloat16).eps
        else:
            assert_same_bits(gradient, expected[name], name)
            continue
        assert gradient.dtype == expected[name].dtype
        difference = (gradient.double() - expected[name].double()).abs().max()
        assert difference <= tolerance * expected[name].double().abs().max(), name


@all_configs
def test_every_state_forward_and_backward(config: BitQuantConfig) -> None:
    """One compilation a state serves batches of many sizes."""
    model = make_model(config)
    for state in ("training", "evaluation", "deployed"):
        model.train(state == "training")
        if state == "deployed":
            deploy(model)
        torch.compiler.reset()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for rows in ROWS:
            assert_same_step(compiled, model, batch(rows))
        assert counter.frame_count == 1, state


def test_a_marked_batch_dimension_and_more_leading_ones() -> None:
    model = deploy(make_model()).requires_grad_(False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in ROWS:
        x = batch(3 * rows).view(rows, 3, 37)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same_bits(compiled(x), model(x))
    assert counter.frame_count == 1


def test_no_rows_and_one_row() -> None:
    """torch compiles these two sizes on their own."""
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (0, 1):
        y, gradients = step(compiled, model, batch(rows))
        assert_same_bits(y, model(batch(rows)).detach())
        assert gradients["0.weight"].any() == (rows > 0)


def test_autocast() -> None:
    """y in the autocast dtype, gradients in their parameters' dtypes, and nothing else cast, compiled or not."""
    layer = BitLinear(37, 19, quant_config=PER_TOKEN)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for state in ("training", "evaluation", "deployed"):
        layer.train(state == "training")
        if state == "deployed":
            layer.deploy()
        torch.compiler.reset()
        wide = layer(batch(6)).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(layer(batch(6)).detach(), wide.to(torch.bfloat16))
            assert_same_step(compiled, layer, batch(6))
            y, gradients = step(compiled, layer, batch(6))
        assert y.dtype == torch.bfloat16
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        assert_same_step(compiled, layer, batch(6))  # and outside again


def test_the_model_trains_compiled_as_it_does_eagerly() -> None:
    losses = []
    for compile_it in (False, True):
        model = make_model()
        run: Any = torch.compile(model, fullgraph=True) if compile_it else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x, target = batch(64), batch(64)[:, :5]
        for _ in range(40):
            optimizer.zero_grad()
            loss = (run(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    first = (make_model()(batch(64)) - batch(64)[:, :5]).square().mean().item()
    assert losses[0] < 0.7 * first
    # Rounding differences of the biases' gradients may move a weight across a rounding boundary now and then.
    assert abs(losses[1] - losses[0]) < 0.05 * losses[0]


# ---- what CUDA graphs need -------------------------------------------------------------------------------------------


def traced_targets(function: Callable[..., Any], *arguments: Tensor) -> set[str]:
    """Operators that a call consists of, traced on fakes with symbolic sizes: a fake that reads a value would raise."""
    graph = make_fx(function, tracing_mode="symbolic")(*arguments).graph
    sizes = [
        size for node in graph.nodes if isinstance(node.meta.get("val"), Tensor) for size in node.meta["val"].shape
    ]
    assert any(isinstance(size, torch.SymInt) for size in sizes)
    assert not [size for size in sizes if str(size).startswith("u")], "a size depends on data"
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@all_configs
def test_fakes_read_no_value_and_have_no_size_that_depends_on_one(config: BitQuantConfig) -> None:
    x, weight, bias = make_layer(6)
    scale, qweight = bitlinear.prepare_weights(weight, config)

    def training(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
        y = bitlinear.forward(leaves[0], leaves[1], bias=leaves[2], quant_config=config, training=True)
        return torch.autograd.grad(y.sum(), leaves)

    def inference(x: Tensor, scale: Tensor, qweight: Tensor, bias: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = bitlinear.forward(leaf, None, scale, qweight, bias, config)
        return torch.autograd.grad(y.sum(), leaf)[0]

    synchronizing = {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default"}
    for function, arguments, operator in (
        (training, (x, weight, bias), "bitcore.bitlinear_train.default"),
        (inference, (x, scale, qweight, bias), "bitcore.bitlinear.default"),
    ):
        targets = traced_targets(function, *arguments)
        assert operator in targets
        assert not targets & synchronizing


def test_operators_do_not_write_to_their_arguments_nor_return_them() -> None:
    """What a CUDA graph's memory plan relies on."""
    for name in ("bitlinear", "bitlinear_train", "torch_bitlinear", "torch_bitlinear_train", "attach_gradient"):
        schema = getattr(native, name)._schema
        assert not schema.is_mutable
        assert all(result.alias_info is None for result in schema.returns)


def test_reduce_overhead_without_cuda() -> None:
    """On a CPU the mode has no graphs to capture; it must work all the same."""
    model = deploy(make_model()).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert_same_bits(compiled(batch(6)), model(batch(6)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to capture graphs on")
def test_reduce_overhead_on_cuda() -> None:
    model = make_model().cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = batch(6).cuda()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_step(compiled, model, x)
    deployed = deploy(model).requires_grad_(False)
    inference = torch.compile(deployed, fullgraph=True, mode="reduce-overhead")
    expected = deployed(x)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits(inference(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = deployed(x)
    graph.replay()
    assert_same_bits(captured, expected)
