"""Kernels: built-in ones against the contract, user kernels, naming them, compiled code that follows the registry."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bad_tensors import expect
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels import BitKernelBase, KernelRegistry, TorchKernel
from bitcore.kernels.builtin import BUILTIN_KERNELS, FAMILY_NAMES, tile_calls
from bitcore.kernels.registry import selection
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits, check_kernel
from core_helpers import CONFIGS, INT8_CONFIGS, PER_TOKEN, id_of, make_layer
from oracle import Schema
from support import ALL_KERNELS, LACKING_KERNELS, NATIVE_KERNELS, config_of, covers, make_linear, proves
from user_kernels import CustomKernel, Doubled, OwnForm

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
SUPPORTED = [kernel for kernel in BUILTIN_KERNELS if kernel.is_supported()]


class Detached(OwnForm):
    """Loses the graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs).detach()


@pytest.fixture(autouse=True)
def _clean_registry() -> Iterator[None]:
    before = KernelRegistry.list_available_kernels()
    yield
    for name in KernelRegistry.list_available_kernels():
        if name not in before:
            KernelRegistry.unregister(name)


def _infer(config: BitQuantConfig = PER_TOKEN) -> Tensor:
    layer = make_layer(5)
    return bitlinear.forward(layer.x, None, *bitlinear.prepare_weights(layer.weight, config), layer.bias, config)


# ---- built-in kernels ------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kernel", SUPPORTED, ids=lambda kernel: kernel.name)
def test_every_built_in_kernel_keeps_the_contract(kernel: BitKernelBase) -> None:
    check_kernel(kernel)


BUILT_IN = {
    "Int8Avx512VbmiKernel",
    "Int8Avx512VnniKernel",
    "Int8AvxVnniKernel",
    "Int8Avx2Kernel",
    "Int8PortableKernel",
    "Float32Avx512Kernel",
    "Float32Avx2Kernel",
    "Float32PortableKernel",
    "ReferenceKernel",
}


def test_built_in_kernels_are_listed() -> None:
    assert set(NATIVE_KERNELS) >= BUILT_IN
    available = KernelRegistry.list_available_kernels()
    assert {"Int8Kernel", "Float32Kernel", "ReferenceKernel", "TorchKernel"} <= set(available)
    assert len(available) == len(set(available))
    for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"]:
        assert (entry["name"] in available) == entry["supported"], entry


def test_kernels_that_need_another_machine() -> None:
    """Skipped where there are any, so that the summary of every run names what it did not run."""
    if LACKING_KERNELS:
        pytest.skip(f"this CPU lacks what these need: {', '.join(LACKING_KERNELS)}")


def test_best_kernel_is_the_first_that_fits(schema: Schema) -> None:
    names = [name for name in KernelRegistry.list_available_kernels() if name not in ("Int8Kernel", "Float32Kernel")]
    best = next(name for name in names if covers(name, schema))
    found = KernelRegistry.get_kernel_for_config(config_of(schema))
    assert found.name == best
    case = make_linear(3, 18, 40)
    scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, qweight_scale=scale, qweight=qweight, quant_config=config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, weight=case.weight, quant_config=config_of(schema), training=True)


@all_configs
def test_every_config_has_a_bound_kernel(config: BitQuantConfig) -> None:
    best = KernelRegistry.get_kernel_for_config(config)
    family = "Int8Kernel" if config.activation_dtype == "int8" else "Float32Kernel"
    assert best.name == KernelRegistry.get_kernel_by_name(family, config).name == FAMILY_NAMES[family]
    assert best.quant_config == config
    assert KernelRegistry.get_kernel_for_config(config, "cuda:1").name == "TorchKernel"
    layer = make_layer(5)
    scale, qweight = best.prepare_weights(layer.weight, config)
    assert_same_bits(best(layer.x, scale, qweight, layer.bias), _infer(config))
    with pytest.raises(QuantizationError, match="quant_config"):
        TorchKernel()(layer.x, scale, qweight)


def test_kernels_that_cannot_be_had() -> None:
    for name, words in (("Int9Kernel", "known"), ("Float32Kernel", "does not cover")):
        with pytest.raises(KernelNotFoundError, match=words):
            KernelRegistry.get_kernel_by_name(name, PER_TOKEN)
    with pytest.raises(KernelNotFoundError, match="'foo'"):
        KernelRegistry.get_kernel_for_config(PER_TOKEN, "foo")
    with pytest.raises(KernelNotFoundError, match="Int9Kernel"):
        KernelRegistry.unregister("Int9Kernel")
    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.unregister("ReferenceKernel")
    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.register(type("ReferenceKernel", (CustomKernel,), {}))
    assert "ReferenceKernel" in KernelRegistry.list_available_kernels()
    with pytest.raises(KernelNotFoundError, match="Int9Kernel"), KernelRegistry.forced("Int9Kernel"):
        pass
    with KernelRegistry.forced("Float32PortableKernel"), pytest.raises(KernelNotFoundError, match="BitQuantConfig"):
        _infer()
    with KernelRegistry.forced("TorchKernel", "ReferenceKernel"), pytest.raises(KernelNotFoundError, match="more than"):
        _infer()
    _infer()


@pytest.mark.parametrize("name", ALL_KERNELS)
def test_kernel_that_does_not_fit_is_refused(name: str) -> None:
    for config in CONFIGS:
        if not covers(name, Schema(activation_dtype=config.activation_dtype)):
            with pytest.raises(KernelNotFoundError, match=name):
                KernelRegistry.get_kernel_by_name(name, config)
            with pytest.raises(KernelNotFoundError), KernelRegistry.forced(name):
                _infer(config)


def test_a_kernel_that_this_machine_lacks() -> None:
    if not LACKING_KERNELS:
        pytest.skip("this machine runs every kernel")
    entries = {entry["name"]: entry for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"]}
    for name in LACKING_KERNELS:
        config = BitQuantConfig(activation_dtype="int8" if covers(name, Schema()) else "float32")
        words = f"{name} {entries[name]['requirement']}"
        expect(KernelNotFoundError, words, partial(KernelRegistry.get_kernel_by_name, name, config))


def _kernel_name() -> str:
    return KernelRegistry.get_kernel_for_config(PER_TOKEN).name


def test_forced_blocks_may_end_in_any_order() -> None:
    automatic = _kernel_name()
    first, second, third = (KernelRegistry.forced(name) for name in ("TorchKernel", "ReferenceKernel", "TorchKernel"))
    for block in (first, second, third):
        block.__enter__()
    third.__exit__(None, None, None)
    assert _kernel_name() == "ReferenceKernel"
    first.__exit__(None, None, None)
    assert _kernel_name() == "ReferenceKernel"
    second.__exit__(None, None, None)
    assert _kernel_name() == automatic
    assert selection() == ""


def test_a_call_sees_one_state_of_the_registry() -> None:
    stop = threading.Event()

    def force() -> None:
        while not stop.is_set():
            with KernelRegistry.forced("ReferenceKernel"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            forcing = pool.submit(force)
            try:
                names = {_kernel_name() for _ in range(20_000)}
            finally:
                stop.set()
            forcing.result()
    finally:
        sys.setswitchinterval(interval)
    assert names <= {"ReferenceKernel", FAMILY_NAMES["Int8Kernel"]}


# ---- user kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [CustomKernel, CustomKernel()], ids=["class", "instance"])
def test_a_registered_kernel_is_found_listed_and_used(kernel: BitKernelBase | type[BitKernelBase]) -> None:
    plain, generation = _infer(), KernelRegistry.generation
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
    assert_same_bits(_infer(), plain)
    assert CustomKernel.calls == before + 1
    _infer(BitQuantConfig(activation_dtype="float32"))
    assert CustomKernel.calls == before + 1
    with pytest.raises(BitLabError, match="'CustomKernel' is already registered"):
        KernelRegistry.register(CustomKernel)
    KernelRegistry.unregister("CustomKernel")
    with pytest.raises(KernelNotFoundError, match="CustomKernel"):
        KernelRegistry.get_kernel_by_name("CustomKernel", PER_TOKEN)
    check_kernel(kernel)


def test_the_latest_kernel_comes_first_unless_one_is_named() -> None:
    plain = _infer()
    KernelRegistry.register(CustomKernel)
    KernelRegistry.register(Doubled)
    assert_same_bits(_infer(), 2 * plain)
    with KernelRegistry.forced("CustomKernel"):
        assert_same_bits(_infer(), plain)
        with KernelRegistry.forced("Doubled"):
            assert_same_bits(_infer(), 2 * plain)
    with KernelRegistry.forced("Int8Kernel"):
        assert_same_bits(_infer(), plain)
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
    layer, plain = make_layer(5), _infer()
    KernelRegistry.register(CustomKernel)
    scale = base.compute_weight_scale(layer.weight, PER_TOKEN)
    codes = base.quantize_weight(layer.weight, scale, PER_TOKEN)
    assert_same_bits(bitlinear.forward(layer.x, None, scale, codes, layer.bias, PER_TOKEN), plain)


def test_a_kernel_with_a_form_of_its_own() -> None:
    layer, plain = make_layer(5), _infer()
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

    layer, plain = make_layer(5), _infer()
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
    plain = _infer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(_infer(), plain.to(torch.bfloat16))


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
    torch.compiler.reset()
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


# ---- the environment variable ----------------------------------------------------------------------------------------

_SCRIPT = """
import json
import torch
from bitcore import BitQuantConfig, KernelNotFoundError, KernelRegistry
from bitcore.ops import bitlinear

def outcome(dtype, training):
    config = BitQuantConfig("per_tensor", dtype, "per_channel")
    try:
        name = KernelRegistry.get_kernel_for_config(config).name
        weight = torch.ones(3, 5)
        scale, qweight = bitlinear.prepare_weights(weight, config)
        bitlinear.forward(torch.ones(2, 5), weight, scale, qweight, None, config, training)
    except KernelNotFoundError as error:
        return str(error)
    tiles = torch.ops.bitcore.kernel_tile_calls(name) if name != "TorchKernel" else -1
    return [name, tiles]

print(json.dumps([outcome(dtype, training) for dtype in ("int8", "float32") for training in (False, True)]))
"""


def _with_variable(value: str) -> list[Any]:
    environment = {**os.environ, "BITLAB_KERNEL": value, "PYTHONPATH": str(Path(__file__).parents[3] / "python")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return list(json.loads(done.stdout))


@pytest.mark.medium
def test_the_variable_governs_inference_and_training() -> None:
    results = _with_variable("ReferenceKernel")
    assert all(isinstance(result, list) and result[0] == "ReferenceKernel" for result in results)
    tiles = [result[1] for result in results]
    assert tiles == sorted(set(tiles)), "a call ran on another kernel"
    assert _with_variable("TorchKernel") == [["TorchKernel", -1]] * 4


@pytest.mark.medium
def test_the_variable_names_one_kernel_for_each_activation_dtype() -> None:
    int8, _, float32, _ = _with_variable("Int8PortableKernel, Float32PortableKernel")
    assert int8[0] == "Int8PortableKernel"
    assert float32[0] == "Float32PortableKernel"


@pytest.mark.medium
def test_a_call_that_no_named_kernel_covers() -> None:
    int8, _, float32, _ = _with_variable("Float32PortableKernel")
    assert isinstance(int8, str)
    assert "BITLAB_KERNEL" in int8
    assert "activation_dtype='int8'" in int8
    assert float32[0] == "Float32PortableKernel"
    for wrong in ("Int9Kernel", "Int8PortableKernel,Int8Kernel"):
        assert all("BITLAB_KERNEL" in str(result) for result in _with_variable(wrong)[:2])
