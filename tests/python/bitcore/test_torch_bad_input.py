"""Tensors of torch that quantization does not take, on every path that a tensor can come in by.

Sparse, nested, quantized, complex, of another dtype, on another device, too wide: each is a QuantizationError that
names the argument and what it is, whichever kernel is asked. Compiled code raises a RuntimeError with that text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.kernels.base import BitKernelBase
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from bitlayers import BitLinear
from core_helpers import PER_TOKEN, make_layer

FLOAT32 = BitQuantConfig("per_tensor", "float32", "per_channel")
X, WEIGHT, BIAS = make_layer(4)
SCALE, QWEIGHT = bitlinear.prepare_weights(WEIGHT, PER_TOKEN)
TOO_WIDE = 2**24


def bad_tensors() -> dict[str, tuple[Tensor, str]]:
    """Each with the word that its error must hold; all but the last have the shape of a good x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that some of these are prototypes or go away
        return {
            "sparse COO": (X.to_sparse(), "torch.sparse_coo"),
            "sparse CSR": (X.to_sparse_csr(), "torch.sparse_csr"),
            "mkldnn": (X.to_mkldnn(), "torch._mkldnn"),
            "nested": (torch.nested.nested_tensor([X, X]), "nested"),
            "jagged": (torch.nested.nested_tensor([X, X], layout=torch.jagged), "nested"),
            "quantized": (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "quint8"),
            "complex": (torch.complex(X, X), "complex64"),
            "half complex": (torch.complex(X, X).to(torch.complex32), "complex32"),
            "float64": (X.double(), "float64"),
            "bool": (X > 0, "bool"),
            "int64": (X.long(), "int64"),
        }


BAD = bad_tensors()
WIDE = torch.ones(1, 1).expand(1, TOO_WIDE)


def forwards(x: Tensor) -> dict[str, Callable[[], object]]:
    """Every whole layer that takes an x."""
    trainable, evaluated = BitLinear(37, 19, quant_config=PER_TOKEN), BitLinear(37, 19, quant_config=PER_TOKEN).eval()
    return {
        "training": lambda: bitlinear.forward(x, WEIGHT, bias=BIAS, quant_config=PER_TOKEN, training=True),
        "training, float32": lambda: bitlinear.forward(x, WEIGHT, quant_config=FLOAT32, training=True),
        "inference": lambda: bitlinear.forward(x, None, SCALE, QWEIGHT, BIAS, PER_TOKEN),
        "inference, float32": lambda: bitlinear.forward(x, None, SCALE, QWEIGHT, None, FLOAT32),
        "BitLinear training": lambda: trainable(x),
        "BitLinear in evaluation": lambda: evaluated(x),
        "BitLinear deployed": lambda: BitLinear(37, 19, quant_config=PER_TOKEN).deploy()(x),
    }


def other_arguments(bad: Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """Calls of forward and prepare_weights in which another tensor than x is bad, and which."""
    return {
        "weight": ("weight", lambda: bitlinear.forward(X, bad, quant_config=PER_TOKEN, training=True)),
        "bias": ("bias", lambda: bitlinear.forward(X, None, SCALE, QWEIGHT, bad, PER_TOKEN)),
        "bias in training": ("bias", lambda: bitlinear.forward(X, WEIGHT, None, None, bad, PER_TOKEN, True)),
        "qweight_scale": ("qweight_scale", lambda: bitlinear.forward(X, None, bad, QWEIGHT, None, PER_TOKEN)),
        "qweight": ("qweight", lambda: bitlinear.forward(X, None, SCALE, bad, None, PER_TOKEN)),
        "prepare_weights": ("weight", lambda: bitlinear.prepare_weights(bad, PER_TOKEN)),
    }


def base_operations(bad: Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    column = torch.ones(4, 1)
    return {
        "compute_weight_scale": ("weight", lambda: base.compute_weight_scale(bad, PER_TOKEN)),
        "quantize_weight": ("weight", lambda: base.quantize_weight(bad, SCALE, PER_TOKEN)),
        "quantize_weight, scale": ("scale", lambda: base.quantize_weight(WEIGHT, bad, PER_TOKEN)),
        "dequantize_weight": ("qweight", lambda: base.dequantize_weight(bad, SCALE, PER_TOKEN)),
        "fake_quantize_weight": ("weight", lambda: base.fake_quantize_weight(bad, PER_TOKEN)),
        "compute_x_scale": ("x", lambda: base.compute_x_scale(bad, PER_TOKEN)),
        "compute_x_scale, float32": ("x", lambda: base.compute_x_scale(bad, FLOAT32)),
        "quantize_x": ("x", lambda: base.quantize_x(bad, column, PER_TOKEN)),
        "quantize_x, float32": ("x", lambda: base.quantize_x(bad, column, FLOAT32)),
        "quantize_x, scale": ("scale", lambda: base.quantize_x(X, bad, PER_TOKEN)),
        "dequantize_x": ("qx", lambda: base.dequantize_x(bad, column, PER_TOKEN)),
        "fake_quantize_x": ("x", lambda: base.fake_quantize_x(bad, PER_TOKEN)),
        "fake_quantize_x, float32": ("x", lambda: base.fake_quantize_x(bad, FLOAT32)),
        "pack_weights": ("qweight", lambda: base.pack_weights(bad)),
        "unpack_weights": ("qweight", lambda: base.unpack_weights(bad, 37)),
        "check_qweight": ("qweight", lambda: base.check_qweight(bad, 37)),
        "repack": ("qweight", lambda: base.repack(bad, 37)),
    }


class StandardForm(BitKernelBase):
    """A user's kernel that reads the packed form."""

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        assert quant_config is not None
        return native.torch_bitlinear(x, qweight_scale, qweight, bias, *quant_config.flags)

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return True


class OwnForm(BitKernelBase):
    """A user's kernel with float64 weights. The argument checks are not its business."""

    def prepare_weights(self, weight: Tensor, quant_config: BitQuantConfig) -> tuple[Tensor, Tensor]:
        return weight.abs().mean(), weight.double()

    def accepts(self, qweight: Tensor) -> bool:
        return qweight.dtype == torch.float64

    def __call__(
        self,
        x: Tensor,
        qweight_scale: Tensor,
        qweight: Tensor,
        bias: Tensor | None = None,
        quant_config: BitQuantConfig | None = None,
    ) -> Tensor:
        return x @ qweight.to(x.dtype).t()

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        return True


@contextmanager
def registered(kernel: type[BitKernelBase]) -> Iterator[None]:
    KernelRegistry.register(kernel)
    try:
        yield
    finally:
        KernelRegistry.unregister(kernel.name)


PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "native": nullcontext,
    "TorchKernel": lambda: KernelRegistry.forced("TorchKernel"),
    "user kernel": lambda: registered(StandardForm),
    "user kernel, own form": lambda: registered(OwnForm),
}
paths = pytest.mark.parametrize("path", PATHS)
bad_ones = pytest.mark.parametrize("kind", BAD)


def expect(name: str, word: str, call: Callable[[], object], what: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is QuantizationError
    assert message.startswith(f"{name} "), f"{what}: {message}"
    assert word in message, f"{what}: {message}"
    assert "\n" not in message, f"{what}: {message}"


@paths
@bad_ones
def test_x(kind: str, path: str) -> None:
    x, word = BAD[kind]
    with PATHS[path]():
        for what, call in forwards(x).items():
            expect("x", word, call, what)
        with torch.no_grad():
            expect("x", word, forwards(x)["inference"], "inference without gradients")


@paths
@bad_ones
def test_other_arguments(kind: str, path: str) -> None:
    bad, word = BAD[kind]
    with PATHS[path]():
        for what, (name, call) in other_arguments(bad).items():
            if path == "user kernel, own form" and what == "qweight" and kind == "float64":
                continue  # the form that this kernel reads
            expect(name, word if what != "qweight" else "", call, what)


@bad_ones
def test_base_operations(kind: str) -> None:
    bad, word = BAD[kind]
    for what, (name, call) in base_operations(bad).items():
        expect(name, word, call, what)


@paths
def test_tensors_on_different_devices(path: str) -> None:
    """The second device is meta, which every machine has."""
    with PATHS[path]():
        for what, (name, call) in other_arguments(X.to("meta")).items():
            if what not in ("prepare_weights", "qweight"):
                expect(name, f"{name} is on meta, x is on cpu", call, what)
        meta_qweight = QWEIGHT.to("meta")
        with pytest.raises(QuantizationError, match=r"^qweight is on meta, x is on cpu$"):
            bitlinear.forward(X, None, SCALE, meta_qweight, None, PER_TOKEN)
        for what, call in forwards(X.to("meta")).items():
            with pytest.raises(
                QuantizationError, match=r"^(weight|qweight|qweight_scale|bias) is on cpu, x is on meta$"
            ):
                call()
            assert what
    for what, (name, call) in base_operations(X.to("meta")).items():
        if "scale" in what and "compute" not in what:
            expect(name, f"{name} is on meta", call, what)


@paths
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wider_than_the_bound(device: str, path: str) -> None:
    """On a CPU a row that is one number many times over; on meta nothing is allocated at all."""
    wide = WIDE if device == "cpu" else torch.empty(1, TOO_WIDE, device="meta")
    codes = wide.to(torch.int8) if device == "meta" else torch.ones(1, 1, dtype=torch.int8).expand(1, TOO_WIDE)
    scale, column = torch.ones((), device=device), torch.ones(1, 1, device=device)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("weight", lambda: bitlinear.prepare_weights(wide, PER_TOKEN)),
        ("weight", lambda: base.compute_weight_scale(wide, PER_TOKEN)),
        ("weight", lambda: base.quantize_weight(wide, scale, PER_TOKEN)),
        ("weight", lambda: base.fake_quantize_weight(wide, PER_TOKEN)),
        ("qweight", lambda: base.dequantize_weight(codes, scale, PER_TOKEN)),
        ("qweight", lambda: base.pack_weights(codes)),
        ("x", lambda: base.compute_x_scale(wide, PER_TOKEN)),
        ("x", lambda: base.compute_x_scale(wide, FLOAT32)),
        ("x", lambda: base.quantize_x(wide, column, PER_TOKEN)),
        ("x", lambda: base.fake_quantize_x(wide, FLOAT32)),
        ("qx", lambda: base.dequantize_x(codes, column, PER_TOKEN)),
    ]
    with PATHS[path]():
        for name, call in calls:
            expect(name, f"{TOO_WIDE}", call, name)
            expect(name, f"{TOO_WIDE - 1}", call, name)
        with pytest.raises(QuantizationError, match=rf"^(x|weight) has {TOO_WIDE} .*at most {TOO_WIDE - 1} "):
            bitlinear.forward(wide, wide, quant_config=PER_TOKEN, training=True)
        if path != "user kernel, own form":  # which takes no codes
            with pytest.raises(QuantizationError, match=rf"^(x|qweight) has {TOO_WIDE} .*at most {TOO_WIDE - 1} "):
                bitlinear.forward(wide, None, scale, codes, None, PER_TOKEN)


def test_meta_tensors_alone_give_shapes_and_no_values() -> None:
    """The one use of meta that is no error: every tensor is there."""
    scale, qweight = (tensor.to("meta") for tensor in (SCALE, QWEIGHT))
    y = bitlinear.forward(X.to("meta"), None, scale, qweight, BIAS.to("meta"), PER_TOKEN)
    trained = bitlinear.forward(X.to("meta"), WEIGHT.to("meta"), quant_config=PER_TOKEN, training=True)
    assert y.is_meta
    assert trained.is_meta
    assert y.shape == trained.shape == (4, 19)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["complex", "float64", "bool", "int64", "meta", "wide"])
def test_compiled_code(kind: str, training: bool) -> None:
    """What the fakes find, while torch traces, names the class and the argument."""
    torch.compiler.reset()
    x, word = {"meta": (X.to("meta"), "x is on meta"), "wide": (WIDE, str(TOO_WIDE))}.get(kind) or BAD[kind]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Any:
        return bitlinear.forward(x, WEIGHT, SCALE, QWEIGHT, None, PER_TOKEN, training)

    with pytest.raises(RuntimeError, match=r"QuantizationError") as caught:
        run(x)
    assert word in str(caught.value)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["sparse COO", "nested", "quantized"])
def test_compiled_code_of_what_the_compiler_itself_refuses(kind: str) -> None:
    """Without fullgraph torch leaves such a call to eager mode, which raises as ever."""
    torch.compiler.reset()

    def run(x: Tensor) -> Any:
        return bitlinear.forward(x, None, SCALE, QWEIGHT, None, PER_TOKEN)

    with pytest.raises(RuntimeError):
        torch.compile(run, fullgraph=True, backend="aot_eager")(BAD[kind][0])
    expect("x", BAD[kind][1], lambda: torch.compile(run, backend="aot_eager")(BAD[kind][0]), kind)
