"""BitLinear: two states, one packed copy that is never out of date, and nothing else in a state_dict."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig, all_configs
from bitcore.exceptions import QuantizationError, StateError
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitcore.ops import bitlinear
from bitcore.ops.base import compute_weight_scale, dequantize_weight, quantize_weight
from bitlayers import BitLinear, deploy
from layer_helpers import PER_CHANNEL, SIZES, buffers_of, evaluate, make_layer, make_x
from support import same_bits


@pytest.fixture
def x() -> Tensor:
    return make_x()


# --- construction ---------------------------------------------------------------------------------------------------


def test_is_an_nn_linear_with_its_initial_values() -> None:
    layer = make_layer()
    torch.manual_seed(0)
    linear = nn.Linear(*SIZES)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    assert layer.quant_config == BitQuantConfig()
    assert not layer.is_deployed
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert BitLinear(*SIZES, bias=False).bias is None


def test_init_methods() -> None:
    names = ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "normal", "orthogonal"]
    weights = [make_layer(init_method=name).weight for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert torch.equal(make_layer(init_method=nn.init.ones_).weight, torch.ones(19, 37))
    with pytest.raises(QuantizationError, match="Unknown initialization method.*nonsense"):
        make_layer(init_method="nonsense")


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((0, 4), "in_features is 0"), ((4, -1), "out_features is -1"), (("8", 8), "in_features is '8'")],
)
def test_sizes_that_are_no_counts(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(QuantizationError, match=name):
        BitLinear(*sizes)


def test_config_of_another_type() -> None:
    with pytest.raises(QuantizationError, match="quant_config is 'int8'"):
        make_layer("int8")  # type: ignore[arg-type]


def test_meta_device_and_dtype() -> None:
    layer = BitLinear(8, 4, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer.weight).all()


def test_repr_tells_the_schema_and_the_state() -> None:
    layer = make_layer(PER_CHANNEL)
    assert "ternary per_channel, activations=int8 per_channel" in repr(layer)
    assert "deployed" not in repr(layer)
    assert "deployed" in repr(layer.deploy())
    assert "activations=float32" in repr(make_layer(BitQuantConfig(activation_dtype="float32")))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", all_configs(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_evaluation_and_deployment_agree(config: BitQuantConfig, dtype: torch.dtype, x: Tensor) -> None:
    layer, x = make_layer(config, dtype=dtype), x.to(dtype)
    trained = layer(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    with_gradients = layer(x)
    deployed = layer.deploy()(x)
    assert trained.dtype == dtype
    assert same_bits(evaluated, with_gradients)
    assert same_bits(evaluated, deployed)
    if config.activation_dtype == "int8":
        assert same_bits(evaluated, trained)
    else:
        torch.testing.assert_close(evaluated, trained)


@pytest.mark.parametrize("shape", [(37,), (0, 37), (2, 3, 37), (1, 37)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = make_layer(PER_CHANNEL)
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 19)
    assert same_bits(layer.eval()(x), layer.deploy()(x))


def test_wrong_width_names_both_values() -> None:
    layer = make_layer()
    for prepared in (layer, layer.eval(), layer.deploy()):
        with pytest.raises(QuantizationError, match="36.*37|37.*36"):
            prepared(torch.zeros(2, 36))


@pytest.mark.parametrize("config", all_configs(), ids=str)
def test_evaluation_gives_the_gradients_of_training(config: BitQuantConfig, x: Tensor) -> None:
    gradients = []
    dy = torch.randn(5, 19)
    layer = make_layer(config)
    for mode in (True, False):
        layer.train(mode).zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        assert layer.bias is not None
        gradients.append((leaf.grad, layer.weight.grad, layer.bias.grad))
    for trained, evaluated in zip(*gradients, strict=True):
        assert trained is not None
        assert evaluated is not None
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-5 * float(trained.abs().max()))


def test_a_deployed_layer_passes_gradients_on(x: Tensor) -> None:
    layer = make_layer(PER_CHANNEL).deploy()
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_evaluation_has_no_second_derivative(x: Tensor) -> None:
    layer = make_layer().eval()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True)


@pytest.mark.parametrize("config", all_configs(), ids=str)
def test_evaluation_on_the_meta_device_has_a_backward(config: BitQuantConfig) -> None:
    layer = make_layer(config, device="meta").eval()
    layer(torch.empty(5, SIZES[0], device="meta")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (19, 37)


def test_autocast_decides_the_dtype(x: Tensor) -> None:
    layer = make_layer(PER_CHANNEL)
    full = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        trained, evaluated = layer.train()(x), layer.eval()(x)
    assert same_bits(trained, evaluated)
    assert same_bits(evaluated, full.to(torch.bfloat16))
    evaluated.sum().backward()
    assert layer.weight.grad is not None


# --- the packed copy ------------------------------------------------------------------------------------------------


@pytest.fixture
def count_packings(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[int] = []
    original = bitlinear.prepare_weights

    def counting(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(bitlinear, "prepare_weights", counting)
    return lambda: len(calls)


@torch.no_grad()
def test_the_copy_is_made_once(count_packings: Callable[[], int], x: Tensor) -> None:
    layer = make_layer().eval()
    for _ in range(3):
        layer(x)
    assert count_packings() == 1
    layer.eval()(x)
    assert count_packings() == 1
    layer.train().eval()(x)
    assert count_packings() == 2


def replaced(layer: BitLinear) -> None:
    layer.weight = nn.Parameter(torch.randn(19, 37))


def changed_in_place(layer: BitLinear) -> None:
    layer.weight.mul_(torch.randn(19, 37))


def changed_storage(layer: BitLinear) -> None:
    layer.weight.data = torch.randn(19, 37)


def stepped(layer: BitLinear) -> None:
    layer.weight.grad = torch.randn(19, 37)
    torch.optim.SGD([layer.weight], lr=1.0).step()


def compiled_step(layer: BitLinear) -> None:
    layer.weight.grad = torch.randn(19, 37)
    optimizer = torch.optim.SGD([layer.weight], lr=1.0, fused=True)
    torch.compile(optimizer.step, backend="aot_eager")()


def cast(layer: BitLinear) -> None:
    layer.bfloat16().float()


def loaded(layer: BitLinear) -> None:
    layer.load_state_dict(BitLinear(*SIZES, init_method="normal").state_dict())


def another_config(layer: BitLinear) -> None:
    layer.quant_config = PER_CHANNEL


CHANGES = [replaced, changed_in_place, changed_storage, stepped, compiled_step, cast, loaded, another_config]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_the_copy_follows_the_weight(change: Callable[[BitLinear], None], x: Tensor) -> None:
    layer = make_layer().eval()
    before = layer(x)
    change(layer)
    after = layer(x)
    assert not same_bits(before, after)
    assert same_bits(after, evaluate(layer, x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_the_copy_follows_every_optimizer(name: str, fused: bool, x: Tensor) -> None:
    layer = make_layer().eval()
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.5, fused=fused)
    before = layer(x)
    before.pow(2).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not same_bits(layer(x), before)
        assert same_bits(layer(x), evaluate(layer, x))


def test_a_step_of_others_leaves_the_copy(count_packings: Callable[[], int], x: Tensor) -> None:
    layer, other = make_layer().eval(), make_layer().eval()
    optimizer = torch.optim.AdamW([*layer.parameters(), *other.parameters()], fused=True)
    layer(x)
    other(x).sum().backward()
    optimizer.step()
    layer(x)
    assert count_packings() == 2


def test_the_copy_follows_a_functional_call(x: Tensor) -> None:
    layer = make_layer().eval()
    other = {"weight": torch.randn(19, 37), "bias": torch.zeros(19)}
    with torch.no_grad():
        before = layer(x)
        substituted = torch.func.functional_call(layer, other, (x,))
        assert same_bits(layer(x), before)
    assert not same_bits(substituted, before)


def test_an_inference_tensor_cannot_hide_a_change(x: Tensor) -> None:
    with torch.inference_mode():
        layer = make_layer().eval()
        before = layer(x)
        layer.weight.neg_()
        assert not same_bits(layer(x), before)


def test_a_copy_made_in_inference_mode_serves_autograd(x: Tensor) -> None:
    layer = make_layer().eval()
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None


@torch.no_grad()
def test_the_copy_is_never_saved(x: Tensor) -> None:
    layer = make_layer().eval()
    layer(x)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not list(layer.buffers())
    assert len(pickle.dumps(layer)) < len(pickle.dumps(make_layer())) + 64
    assert copy.deepcopy(layer)._packed is None


@torch.no_grad()
def test_a_weight_that_is_not_finite(x: Tensor) -> None:
    layer = make_layer().eval()
    layer.weight[3, 5] = torch.nan
    with pytest.raises(QuantizationError):
        layer(x)
    with pytest.raises(QuantizationError):
        layer.deploy()
    assert not layer.is_deployed
    assert torch.isnan(layer.train()(x)).all()


def test_many_threads_share_a_layer(x: Tensor) -> None:
    layer = make_layer(PER_CHANNEL).eval()
    expected = evaluate(layer, x)
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(layer(x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(same_bits(result, expected) for result in results)


# --- deployment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", all_configs(), ids=str)
def test_deploy_leaves_packed_weights_only(config: BitQuantConfig) -> None:
    layer = make_layer(config)
    expected = bitlinear.prepare_weights(layer.weight.detach(), config)
    assert layer.deploy() is layer
    scale, qweight = buffers_of(layer)
    assert layer.is_deployed
    assert not layer.training
    assert layer._parameters["weight"] is None
    assert set(layer.state_dict()) == {"qweight", "qweight_scale", "bias"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert torch.equal(scale, expected[0])
    assert torch.equal(qweight, expected[1])


def test_deploy_twice() -> None:
    layer = make_layer().deploy()
    with pytest.raises(StateError, match="deployed already"):
        layer.deploy()


def test_a_deployed_layer_computes_the_same_in_training_mode(x: Tensor) -> None:
    layer = make_layer().deploy()
    x = x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.sum(), (x, layer.bias))
    nn.Sequential(layer).train()
    assert layer.training
    assert layer.is_deployed
    y_in_training = layer(x)
    assert same_bits(y_in_training, y)
    for gradient, expected in zip(torch.autograd.grad(y_in_training.sum(), (x, layer.bias)), gradients, strict=True):
        assert same_bits(gradient, expected)
    nn.Sequential(layer).eval()
    assert not layer.training


def test_a_deployed_layer_cannot_be_initialized() -> None:
    with pytest.raises(StateError, match=r"reset_parameters.*deployed"):
        make_layer().deploy().reset_parameters()


@pytest.mark.parametrize("way", ["deploy", "load"])
def test_a_layer_deployed_in_inference_mode_passes_gradients_on(way: str, x: Tensor) -> None:
    layer, state = make_layer(), make_layer().deploy().state_dict()
    with torch.inference_mode():
        layer.deploy() if way == "deploy" else layer.load_state_dict(state)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None


def test_deploy_of_a_parametrized_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(make_layer())
    with pytest.raises(QuantizationError, match="parametrized"):
        layer.deploy()


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda layer: layer.to("cpu", torch.float16)]
)
def test_casting_keeps_scale_and_codes(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = make_layer(PER_CHANNEL).deploy()
    scale, qweight = (tensor.clone() for tensor in buffers_of(layer))
    cast(layer)
    assert layer.bias is not None
    assert layer.bias.dtype != torch.float32
    assert torch.equal(buffers_of(layer)[0], scale)
    assert buffers_of(layer)[0].dtype == torch.float32
    assert torch.equal(buffers_of(layer)[1], qweight)


def test_moving_moves_the_buffers() -> None:
    scale, qweight = buffers_of(make_layer().deploy().to("meta"))
    assert scale.is_meta
    assert qweight.is_meta


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_copies_are_independent(clone: Callable[[BitLinear], BitLinear], deployed: bool, x: Tensor) -> None:
    layer = make_layer().eval()
    expected = layer(x)
    if deployed:
        layer.deploy()
    other = clone(layer)
    assert other.is_deployed == deployed
    assert same_bits(other(x), expected)
    next(other.parameters()).add_(1)
    assert same_bits(layer(x), expected)
    assert not same_bits(other(x), expected)


# --- state_dict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", all_configs(), ids=str)
@torch.no_grad()
def test_a_deployed_state_makes_a_layer_deployed(config: BitQuantConfig, assign: bool, x: Tensor) -> None:
    source = make_layer(config).deploy()
    layer = BitLinear(*SIZES, quant_config=config)
    result = layer.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert layer.is_deployed
    assert layer.training  # loading a state never changes the mode
    assert layer._parameters["weight"] is None
    assert same_bits(layer(x), source(x))
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert same_bits(layer(x), source(x))


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_a_trainable_state_makes_a_layer_trainable(assign: bool, x: Tensor) -> None:
    source = make_layer()
    layer = BitLinear(*SIZES).deploy()
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert not layer.is_deployed
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.weight.requires_grad
    assert same_bits(layer(x), source.eval()(x))
    assert same_bits(layer.train()(x), source(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_scale_is_float32(assign: bool) -> None:
    state = make_layer(PER_CHANNEL).deploy().state_dict()
    state["qweight_scale"] = state["qweight_scale"].half()
    layer = BitLinear(*SIZES, quant_config=PER_CHANNEL)
    layer.load_state_dict(state, assign=assign)
    assert buffers_of(layer)[0].dtype == torch.float32


def damaged_payload(state: dict[str, Tensor]) -> None:
    state["qweight"].flatten()[3] ^= 1


def damaged_trailer(state: dict[str, Tensor]) -> None:
    state["qweight"].flatten()[-1] = 7


def cut(state: dict[str, Tensor]) -> None:
    state["qweight"] = state["qweight"][:, :-1]


def other_rows(state: dict[str, Tensor]) -> None:
    state["qweight"] = BitLinear(37, 20).deploy().state_dict()["qweight"]


def other_columns(state: dict[str, Tensor]) -> None:
    state["qweight"] = BitLinear(38, 19).deploy().state_dict()["qweight"]


def negative_scale(state: dict[str, Tensor]) -> None:
    state["qweight_scale"] = -state["qweight_scale"]


def nan_scale(state: dict[str, Tensor]) -> None:
    state["qweight_scale"] = state["qweight_scale"] * torch.nan


def scale_of_another_granularity(state: dict[str, Tensor]) -> None:
    state["qweight_scale"] = torch.ones(19)


def integer_scale(state: dict[str, Tensor]) -> None:
    state["qweight_scale"] = torch.ones((), dtype=torch.int32)


def no_scale(state: dict[str, Tensor]) -> None:
    del state["qweight_scale"]


def both_forms(state: dict[str, Tensor]) -> None:
    state["weight"] = torch.zeros(19, 37)


DAMAGES = [
    damaged_payload,
    damaged_trailer,
    cut,
    other_rows,
    other_columns,
    negative_scale,
    nan_scale,
    scale_of_another_granularity,
    integer_scale,
    no_scale,
    both_forms,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("deployed", [False, True])
def test_a_damaged_state_changes_nothing(damage: Callable[[dict[str, Tensor]], None], deployed: bool) -> None:
    state = {name: tensor.clone() for name, tensor in make_layer().deploy().state_dict().items()}
    damage(state)
    layer = make_layer(init_method="normal")
    if deployed:
        layer.deploy()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(QuantizationError, match="qweight"):
        layer.load_state_dict(state)
    after = layer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_trainable_state_that_is_not_finite_or_of_another_shape() -> None:
    state = make_layer().state_dict()
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        make_layer().load_state_dict({**state, "weight": torch.full((19, 37), torch.inf)})
    with pytest.raises(QuantizationError, match=r"weight has shape \(19, 36\), expected \(19, 37\)"):
        make_layer().deploy().load_state_dict({**state, "weight": torch.zeros(19, 36)})


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.full((19,), torch.nan), "bias holds NaN or infinity"),
        (torch.full((19,), -torch.inf), "bias holds NaN or infinity"),
        (torch.zeros(19, dtype=torch.float64), "bias has dtype torch.float64"),
        (torch.zeros(19, dtype=torch.int32), "bias has dtype torch.int32"),
    ],
)
def test_a_bias_that_is_not_finite_or_of_another_dtype(deployed: bool, bias: Tensor, message: str) -> None:
    source, layer = make_layer(), make_layer()
    state = {**(source.deploy() if deployed else source).state_dict(), "bias": bias}
    with pytest.raises(QuantizationError, match=message):
        layer.load_state_dict(state)
    assert not layer.is_deployed


@pytest.mark.parametrize(("name", "deployed"), [("weight", False), ("qweight_scale", True)])
def test_a_state_of_double_precision(name: str, deployed: bool) -> None:
    source = make_layer()
    state = (source.deploy() if deployed else source).state_dict()
    with pytest.raises(QuantizationError, match=f"{name} has dtype torch.float64"):
        make_layer().load_state_dict({**state, name: state[name].double()})


def test_states_of_a_whole_model(x: Tensor) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(BitLinear(37, 16), nn.ReLU(), BitLinear(16, 3))

    source, target = make().eval(), make()
    deploy(source)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(target.eval()(x), source(x))
    with pytest.raises(QuantizationError, match=r"2\.qweight"):
        make().load_state_dict({**source.state_dict(), "2.qweight": torch.zeros(3, 5, dtype=torch.uint8)})


# --- compiled -------------------------------------------------------------------------------------------------------


def test_compiled_layers_give_the_same_bits(x: Tensor) -> None:
    layer = make_layer(PER_CHANNEL)
    trained = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x), trained)
    with torch.no_grad():
        layer.eval()
        assert same_bits(compiled(x), trained)
        layer.weight.neg_()
        assert same_bits(compiled(x), layer(x))
        expected = layer.deploy()(x)
        assert same_bits(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


# --- registered kernels ---------------------------------------------------------------------------------------------


class FloatFormKernel(BitKernelBase):
    """Keeps dequantized weights, a form of its own, and doubles y so that it shows."""

    def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        scale = compute_weight_scale(weight, quant_config)
        codes = quantize_weight(weight, scale, quant_config)
        return scale, dequantize_weight(codes, scale, quant_config)

    def accepts(self, qweight: Tensor) -> bool:
        return qweight.is_floating_point()

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        return 2 * nn.functional.linear(x, qweight, bias)

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return quant_config.activation_dtype == "float32"


@torch.no_grad()
def test_a_registered_kernel_serves_a_layer_until_it_goes(x: Tensor) -> None:
    layer = make_layer(BitQuantConfig(activation_dtype="float32")).eval()
    before = layer(x)
    KernelRegistry.register(FloatFormKernel)
    try:
        torch.testing.assert_close(layer(x), 2 * before)
        deployed = copy.deepcopy(layer).deploy()
        assert buffers_of(deployed)[1].dtype == torch.uint8
        assert same_bits(deployed(x), before)
    finally:
        KernelRegistry.unregister("FloatFormKernel")
    assert same_bits(layer(x), before)
