"""What torch's own machinery does with ternary layers: checkpointing, sharding, tracing, counting, fast paths."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from bitcore import _torch_private
from bitcore.config import all_configs
from bitcore.exceptions import QuantizationError, StateError
from bitcore.operators import native
from bitlayers import BitLinear, convert, deploy
from layer_helpers import PER_CHANNEL, STATES, layer_in, put_into
from support import same_bits

Run = Callable[[nn.Module, Tensor], Tensor]


def block(state: str = "training", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    ternary = [put_into(state, BitLinear(*sizes, quant_config=PER_CHANNEL)) for sizes in ((24, 32), (32, 24))]
    return nn.Sequential(nn.LayerNorm(24), ternary[0], nn.GELU(), ternary[1])


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, run: Run) -> list[Tensor]:
    """y and the gradients of x and every parameter."""
    x = rows().requires_grad_()
    model.zero_grad()
    y = run(model, x)
    y.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for _, parameter in sorted(model.named_parameters()))]
    return [y.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


# --- activation checkpointing and saved tensors ---------------------------------------------------------------------


def nested(model: nn.Module, x: Tensor) -> Tensor:
    inner: Run = lambda m, a: checkpoint(m, a, use_reentrant=False)  # noqa: E731
    return checkpoint(inner, model, x, use_reentrant=False)


def in_segments(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, nn.Sequential)
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


def on_the_host(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def copied(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        return model(x)


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    run = torch.compile(lambda m, a: checkpoint(m, a, use_reentrant=False), backend="aot_eager", fullgraph=True)
    return run(model, x)


WAYS: dict[str, Run] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "to the end": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "nested": nested,
    "in segments": in_segments,
    "on the host": on_the_host,
    "copied": copied,
    "compiled": compiled,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_saved_tensors_may_be_recomputed_or_moved(state: str, way: str) -> None:
    model = block(state)
    assert_equal(results(model, WAYS[way]), results(model, lambda m, x: m(x)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_under_autocast(use_reentrant: bool) -> None:
    def autocast(run: Run) -> Run:
        def inside(model: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(model, x).float()

        return inside

    model = block()
    expected = results(model, autocast(lambda m, x: m(x)))
    assert_equal(results(model, autocast(lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant))), expected)


# --- sharding and replication ---------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for part in model.modules():
        if isinstance(part, BitLinear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("distribute", [sharded, DistributedDataParallel])
@pytest.mark.parametrize("training", [True, False])
def test_a_distributed_model_trains_as_the_plain_one(
    distribute: Callable[[nn.Module], nn.Module], training: bool
) -> None:
    plain, distributed = block(), distribute(block())
    optimizers = [torch.optim.SGD(model.train(training).parameters(), lr=0.5) for model in (plain, distributed)]
    x = rows()
    for _ in range(3):
        outputs = [model(x) for model in (plain, distributed)]
        assert same_bits(outputs[0].detach(), outputs[1].detach())
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert same_bits(plain.eval()(x), distributed.eval()(x))


# --- tracing and compiling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_symbolic_trace_of_a_model(state: str) -> None:
    model = block(state)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 4
    assert_equal(results(traced, lambda m, x: m(x)), results(model, lambda m, x: m(x)))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bias", [True, False])
def test_symbolic_trace_of_one_layer(state: str, bias: bool) -> None:
    layer = put_into(state, BitLinear(24, 8, bias, quant_config=PER_CHANNEL))
    traced = torch.fx.symbolic_trace(layer)
    assert_equal(results(traced, lambda m, x: m(x)), results(layer, lambda m, x: m(x)))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(state: str, grad: bool) -> None:
    layer = layer_in(state)
    x = torch.randn(3, layer.in_features)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, (x,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert same_bits(torch.jit.load(file)(-x).detach(), layer(-x).detach())


def test_jit_script_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(BitLinear(4, 4)))


@pytest.mark.medium
@pytest.mark.parametrize("state", STATES)
def test_compiled_autograd(state: str) -> None:
    model = block(state)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    expected = results(model, run)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        assert_equal(results(model, run), expected)


# --- counting -------------------------------------------------------------------------------------------------------


def flops(model: nn.Module, backward: bool) -> int:
    x = rows().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("state", STATES)
def test_flops_are_those_of_a_float_layer(state: str) -> None:
    layer = put_into(state, BitLinear(24, 8, quant_config=PER_CHANNEL))
    plain = nn.Linear(24, 8)
    assert flops(layer, backward=False) == flops(plain, backward=False) == 2 * 4 * 24 * 8
    frozen = plain.requires_grad_(state != "deployed")
    assert flops(layer, backward=True) == flops(frozen, backward=True)


# --- modules of torch that read a weight past its layer -------------------------------------------------------------


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.linear1 = BitLinear.from_linear(layer.linear1, PER_CHANNEL)
    layer.linear2 = BitLinear.from_linear(layer.linear2, PER_CHANNEL)
    return layer


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("make", [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_an_encoder_layer_computes_with_ternary_weights(make: Callable[[Any], Any], deployed: bool) -> None:
    layer, x = make(encoder_layer()), torch.randn(2, 5, 16)
    trained = layer(x)
    if deployed:
        deploy(layer)
    layer.eval()
    torch.testing.assert_close(layer(x), trained, rtol=0, atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_a_converted_encoder_may_be_compiled(deployed: bool) -> None:
    encoder = convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2))
    x = torch.randn(2, 5, 16)
    trained = encoder(x)
    if deployed:
        deploy(encoder)
    encoder.eval()
    found = torch.compile(encoder, backend="aot_eager")(x)
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("state", STATES)
def test_a_decoder_layer_computes_with_ternary_weights(state: str) -> None:
    torch.manual_seed(3)
    decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    convert(decoder, PER_CHANNEL)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    expected = decoder(x, memory).detach()
    if state == "deployed":
        deploy(decoder)
    torch.testing.assert_close(decoder.eval()(x, memory).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("grad", [True, False])
def test_attention_with_a_ternary_output_projection_is_refused(state: str, grad: bool) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).train(state == "training")
    attention.out_proj = put_into(state, BitLinear(16, 16, quant_config=PER_CHANNEL))  # type: ignore[assignment]
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad), pytest.raises(QuantizationError, match="out_proj"):
        attention(x, x, x)


# --- pickling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_a_layer_with_any_init_method_can_be_pickled(state: str) -> None:
    layer = layer_in(state, init_method=lambda weight: nn.init.normal_(weight))
    restored = pickle.loads(pickle.dumps(layer))
    assert all(same_bits(a, b) for a, b in zip(restored.parameters(), layer.parameters(), strict=True))
    assert copy.deepcopy(layer).init_method is layer.init_method
    if state != "deployed":
        with pytest.raises(StateError, match="lambda"):
            restored.reset_parameters()
        named = pickle.loads(pickle.dumps(layer_in(state, init_method=nn.init.ones_)))
        named.reset_parameters()
        assert bool((named.weight == 1).all())


@pytest.mark.parametrize("error", [QuantizationError, StateError])
def test_errors_and_configs_can_be_pickled(error: type[Exception]) -> None:
    restored = pickle.loads(pickle.dumps(error("x has 3 features")))
    assert type(restored) is error
    assert str(restored) == "x has 3 features"
    assert [pickle.loads(pickle.dumps(config)) for config in all_configs()] == list(all_configs())


# --- a torch without its undocumented functions ---------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_undocumented_functions_of_torch_are_not_needed(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block(state)
    expected = results(model, lambda m, x: m(x))
    asked: list[str] = []

    def find(owner: object, name: str, otherwise: Any) -> Any:
        asked.append(name)
        return otherwise

    monkeypatch.setattr(_torch_private, "_find", find)
    monkeypatch.setattr(native, "below_autograd", nullcontext)
    monkeypatch.setattr(_torch_private, "_functorch_is_active", lambda: True)
    assert_equal(results(model, lambda m, x: m(x)), expected)
    assert {"apply", "_current_level"} <= set(asked)
