"""Kernels of a user's own: registered, chosen, given checked arguments, their results checked, compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitcore.kernels.builtin import tile_calls
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits, check_kernel
from core_helpers import INT8_CONFIGS, PER_TOKEN, id_of, make_layer
from user_kernels import CustomKernel, Doubled, OwnForm, infer

pytestmark = pytest.mark.usefixtures("clean_registry")


class Detached(OwnForm):
    """Loses the graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs).detach()


@pytest.mark.parametrize("kernel", [CustomKernel, CustomKernel()], ids=["class", "instance"])
def test_a_registered_kernel_is_found_listed_and_used(kernel: BitKernelBase | type[BitKernelBase]) -> None:
    plain, generation = infer(), KernelRegistry.generation
    KernelRegistry.register(kernel)
    assert KernelRegistry.generation > generation
    assert KernelRegistry.list_available_kernels()[0] == "CustomKernel"
    layer = make_layer(5)
    with pytest.raises(QuantizationError, match="quant_config.*None"):
        CustomKernel()(layer.x, *bitlinear.prepare_weights(layer.weight, PER_TOKEN))
    found = KernelRegistry.get_kernel_by_name("CustomKernel", PER_TOKEN)
    assert isinstance(found, CustomKernel)
    assert found.quant_config == PER_TOKEN
    assert isinstance(KernelRegistry.get_kernel_for_config(PER_TOKEN), CustomKernel)
    before = CustomKernel.calls
    assert_same_bits(infer(), plain)
    assert CustomKernel.calls == before + 1
    infer(BitQuantConfig(activation_dtype="float32"))
    assert CustomKernel.calls == before + 1
    with pytest.raises(BitLabError, match="'CustomKernel' is already registered"):
        KernelRegistry.register(CustomKernel)
    KernelRegistry.unregister("CustomKernel")
    with pytest.raises(KernelNotFoundError, match="CustomKernel"):
        KernelRegistry.get_kernel_by_name("CustomKernel", PER_TOKEN)
    check_kernel(kernel)


def test_the_latest_kernel_comes_first_unless_one_is_named() -> None:
    plain = infer()
    KernelRegistry.register(CustomKernel)
    KernelRegistry.register(Doubled)
    assert_same_bits(infer(), 2 * plain)
    with KernelRegistry.forced("CustomKernel"):
        assert_same_bits(infer(), plain)
        with KernelRegistry.forced("Doubled"):
            assert_same_bits(infer(), 2 * plain)
    with KernelRegistry.forced("Int8Kernel"):
        assert_same_bits(infer(), plain)
    with pytest.raises(QuantizationError, match="expected a BitKernelBase"):
        KernelRegistry.register(print)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", INT8_CONFIGS, ids=id_of)
@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_of_the_standard_form_gets_the_gradients(config: BitQuantConfig, training: bool) -> None:
    results = []
    for kernel in (None, CustomKernel):
        if kernel is not None:
            KernelRegistry.register(kernel)
        x, weight, bias = (tensor.clone().requires_grad_() for tensor in make_layer(2, 3))
        scale, qweight = bitlinear.prepare_weights(weight, config)
        y = bitlinear.forward(x, weight, scale, qweight, bias, config, training)
        y.sum().backward()
        results.append((y.detach(), x.grad, bias.grad, weight.grad))
    for plain, custom in zip(*results, strict=True):
        if plain is None:
            assert custom is None
            continue
        assert custom is not None
        assert_same_bits(custom, plain)


def test_int8_codes_are_packed_for_a_kernel_of_the_standard_form() -> None:
    layer, plain = make_layer(5), infer()
    KernelRegistry.register(CustomKernel)
    scale = base.compute_weight_scale(layer.weight, PER_TOKEN)
    codes = base.quantize_weight(layer.weight, scale, PER_TOKEN)
    assert_same_bits(bitlinear.forward(layer.x, None, scale, codes, layer.bias, PER_TOKEN), plain)


def test_a_kernel_with_a_form_of_its_own() -> None:
    layer, plain = make_layer(5), infer()
    standard = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    KernelRegistry.register(OwnForm)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    assert qweight.dtype == torch.float64
    torch.testing.assert_close(bitlinear.forward(layer.x, None, scale, qweight, layer.bias, PER_TOKEN), plain)
    assert_same_bits(bitlinear.forward(layer.x, None, *standard, layer.bias, PER_TOKEN), plain)
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in layer)
    bitlinear.forward(x, weight, bias=bias, quant_config=PER_TOKEN, training=True).sum().backward()
    assert all(leaf.grad is not None for leaf in (x, weight, bias))
    KernelRegistry.unregister("OwnForm")
    with pytest.raises(QuantizationError, match="float64"):
        bitlinear.forward(layer.x, None, scale, qweight, None, PER_TOKEN)
    with KernelRegistry.forced("TorchKernel"), pytest.raises(QuantizationError, match="accepts"):
        bitlinear.forward(layer.x, None, scale, qweight, None, PER_TOKEN)


def test_a_form_of_its_own_may_be_built_on_the_standard_one() -> None:
    class Unpacked(CustomKernel):
        """Keeps int8 codes, which it gets from the public functions."""

        def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
            scale, packed = bitlinear.prepare_weights(weight, quant_config)
            return scale, bitlinear.unpack_weights(packed, weight.shape[-1])

        def accepts(self, qweight: Tensor) -> bool:
            return qweight.dtype == torch.int8

    layer = make_layer(5)
    standard_scale, standard = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    KernelRegistry.register(Unpacked)
    scale, codes = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    assert torch.equal(scale, standard_scale)
    assert torch.equal(codes, bitlinear.unpack_weights(standard, layer.weight.shape[-1]))


def test_a_form_of_its_own_without_accepts() -> None:
    class Floats(OwnForm):
        accepts = BitKernelBase.accepts

    class Codes(Floats):
        """Its codes are also a public form."""

        def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
            scale = base.compute_weight_scale(weight, quant_config)
            return scale, base.quantize_weight(weight, scale, quant_config)

    layer, plain = make_layer(5), infer()
    scale = base.compute_weight_scale(layer.weight, PER_TOKEN)
    codes = base.quantize_weight(layer.weight, scale, PER_TOKEN)
    KernelRegistry.register(Floats)
    own = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    assert own[1].dtype == torch.float64
    torch.testing.assert_close(bitlinear.forward(layer.x, None, *own, layer.bias, PER_TOKEN), plain)
    assert_same_bits(bitlinear.forward(layer.x, None, scale, codes, layer.bias, PER_TOKEN), plain)
    KernelRegistry.register(Codes)
    with pytest.raises(QuantizationError, match=r"Codes prepared a qweight of dtype torch.int8.*override accepts"):
        bitlinear.prepare_weights(layer.weight, PER_TOKEN)


def _damaged(qweight: Tensor) -> Tensor:
    damaged = qweight.clone().flatten()
    damaged[19 * 12] ^= 1  # The first byte of the trailer: in_features 37 gives 12 bytes of payload a row.
    return damaged.view_as(qweight)


def test_a_kernel_of_the_standard_form_gets_a_checked_qweight() -> None:
    KernelRegistry.register(CustomKernel)
    layer, other = make_layer(5), make_layer(5, in_features=38)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    for x, wrong_scale, wrong_qweight, words in (
        (other.x, scale, qweight, "packed for 37 in_features, not 38"),
        (layer.x, scale, _damaged(qweight), "no trailer"),
        (layer.x, 0 * scale, qweight, "finite and positive"),
        (layer.x, torch.nan * scale, qweight, "finite and positive"),
    ):
        calls = CustomKernel.calls
        with pytest.raises(QuantizationError, match=words):
            bitlinear.forward(x, None, wrong_scale, wrong_qweight, layer.bias, PER_TOKEN)
        assert CustomKernel.calls == calls


def test_opcheck_of_the_checked_scale() -> None:
    scale, qweight = bitlinear.prepare_weights(make_layer().weight, PER_TOKEN)
    opcheck(native.checked_scale, (scale, qweight, 37))
    assert native.checked_scale(scale.to("meta"), qweight.to("meta"), 37).shape == ()


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda y: None, "returned None, expected a tensor"),
    "a tuple": (lambda y: (y,), "returned a tuple, expected a tensor"),
    "shape": (lambda y: y[..., 1:], r"shape \(5, 18\), expected \(5, 19\)"),
    "rank": (lambda y: y[None], r"shape \(1, 5, 19\), expected \(5, 19\)"),
    "dtype": (lambda y: y.double(), "dtype torch.float64, expected torch.float32"),
    "device": (lambda y: y.to("meta"), "device meta, expected cpu"),
}


@pytest.mark.parametrize("form", [CustomKernel, OwnForm], ids=["standard form", "own form"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RESULTS)
def test_what_a_kernel_returns_is_checked(name: str, training: bool, form: type[BitKernelBase]) -> None:
    change, words = RESULTS[name]

    class Wrong(form):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> Any:
            return change(super().__call__(*args))

    KernelRegistry.register(Wrong)
    layer = make_layer(5)
    prepared = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    with pytest.raises(QuantizationError, match=f"kernel Wrong returned .*{words}|kernel Wrong {words}"):
        bitlinear.forward(layer.x, layer.weight, *prepared, layer.bias, PER_TOKEN, training)


def test_an_own_form_without_a_bias_may_have_any_out_features() -> None:
    KernelRegistry.register(OwnForm)
    layer = make_layer(5)
    prepared = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    assert bitlinear.forward(layer.x, None, *prepared, None, PER_TOKEN).shape == (5, 19)


@pytest.mark.parametrize("prepared", [None, torch.ones(2), (torch.ones(()),), (torch.ones(()), 3)], ids=repr)
def test_an_own_form_that_is_no_pair_of_tensors(prepared: Any) -> None:
    class Wrong(OwnForm):
        def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
            return prepared

    KernelRegistry.register(Wrong)
    layer = make_layer(5)
    with pytest.raises(QuantizationError, match=r"kernel Wrong: prepare_weights returned .*expected two tensors"):
        bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    with pytest.raises(QuantizationError, match="expected two tensors"):
        bitlinear.forward(layer.x, layer.weight, quant_config=PER_TOKEN, training=True)


@pytest.mark.parametrize("kernel", [CustomKernel, OwnForm])
def test_a_user_kernel_under_autocast(kernel: type[BitKernelBase]) -> None:
    KernelRegistry.register(kernel)
    plain = infer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(infer(), plain.to(torch.bfloat16))


@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_never_detaches_silently(training: bool) -> None:
    KernelRegistry.register(Detached)
    layer = make_layer(5)
    x = layer.x.clone().requires_grad_()
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    with pytest.raises(QuantizationError, match="Detached"):
        bitlinear.forward(x, layer.weight, scale, qweight, None, PER_TOKEN, training)
    with torch.no_grad():
        bitlinear.forward(x, layer.weight, scale, qweight, None, PER_TOKEN, training)


def test_check_kernel_finds_a_wrong_kernel() -> None:
    with pytest.raises(AssertionError, match="Doubled"):
        check_kernel(Doubled)


@pytest.mark.medium
def test_compiled_code_follows_the_registry() -> None:
    layer = make_layer(5)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)

    def infer(x: Tensor) -> Tensor:
        return bitlinear.forward(x, None, scale, qweight, layer.bias, PER_TOKEN)

    compiled = torch.compile(infer, fullgraph=True)
    plain = infer(layer.x)
    assert_same_bits(compiled(layer.x), plain)
    KernelRegistry.register(Doubled)
    assert_same_bits(compiled(layer.x), 2 * plain)
    with KernelRegistry.forced("Int8PortableKernel"):
        before = tile_calls("Int8PortableKernel")
        assert_same_bits(compiled(layer.x), plain)
        assert tile_calls("Int8PortableKernel") > before
    with KernelRegistry.forced("TorchKernel"):
        assert_same_bits(compiled(layer.x), plain)
    KernelRegistry.unregister("Doubled")
    assert_same_bits(compiled(layer.x), plain)
