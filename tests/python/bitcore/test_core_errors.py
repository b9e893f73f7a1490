"""Bad input that needs no value to be read: devices, layouts, Python types; the same texts compiled and plain."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import _ops, base, bitlinear
from core_helpers import PER_TOKEN, id_of, make_layer

FLOAT32 = BitQuantConfig("per_tensor", "float32", "per_channel")


def _forward(training: bool, **changed: Any) -> torch.Tensor:
    layer = make_layer(5)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    arguments: dict[str, Any] = {
        "x": layer.x,
        "weight": layer.weight,
        "qweight_scale": scale,
        "qweight": qweight,
        "bias": layer.bias,
        "quant_config": PER_TOKEN,
    }
    return bitlinear.forward(**{**arguments, **changed}, training=training)


@pytest.mark.parametrize("kernel", ["native", "TorchKernel"])
@pytest.mark.parametrize(
    ("training", "changed", "words"),
    [
        (False, {"x": torch.ones(5, 36)}, ["36", "37"]),
        (True, {"x": torch.ones(5, 36)}, ["x has 36 features, weight expects 37"]),
        (True, {"x": torch.ones(5, 37, dtype=torch.int64)}, ["x has dtype int64, expected float32"]),
        (False, {"x": torch.ones(5, 37, dtype=torch.float64)}, ["x has dtype float64, expected float32"]),
        (False, {"x": torch.ones(())}, ["x has 0 dimensions"]),
        (True, {"x": torch.ones(5, 37).to_sparse()}, ["x is a torch.sparse_coo tensor, expected a dense one"]),
        (True, {"weight": torch.ones(19, 37).to_sparse()}, ["weight is a torch.sparse_coo tensor"]),
        (True, {"x": torch.nested.nested_tensor([torch.ones(5, 37)])}, ["x is a nested tensor"]),
        (False, {"x": torch.nested.nested_tensor([torch.ones(5, 37)], layout=torch.jagged)}, ["x is a nested tensor"]),
        (False, {"qweight_scale": torch.ones(1).to_sparse()}, ["qweight_scale is a torch.sparse_coo tensor"]),
        (False, {"qweight": torch.ones(19, 20, dtype=torch.uint8).to_sparse()}, ["qweight is a torch.sparse_coo"]),
        (True, {"weight": torch.ones(19, 37, device="meta")}, ["weight is on meta, x is on cpu"]),
        (False, {"qweight": torch.ones(19, 16, dtype=torch.uint8, device="meta")}, ["qweight is on meta, x is on cpu"]),
        (False, {"bias": torch.ones(19, device="meta")}, ["bias is on meta, x is on cpu"]),
        (True, {"weight": torch.ones(37)}, ["weight has 1 dimensions, expected 2"]),
        (True, {"weight": torch.ones(19, 37, dtype=torch.int8)}, ["weight has dtype int8, expected float32"]),
        (True, {"bias": torch.ones(18)}, ["bias has shape (18,), expected (19,)"]),
        (False, {"bias": torch.ones(19, dtype=torch.int32)}, ["bias has dtype int32"]),
        (False, {"qweight": torch.ones(19, 37)}, ["qweight has dtype float32"]),
        (False, {"qweight": torch.ones(19, 37, dtype=torch.int8) * 2}, ["qweight"]),
        (False, {"qweight_scale": torch.ones(2)}, ["qweight_scale has shape (2,), expected one element"]),
        (False, {"qweight_scale": torch.ones((), dtype=torch.float64)}, ["qweight_scale has dtype float64"]),
        (False, {"qweight_scale": torch.tensor(-1.0)}, ["qweight_scale", "finite and positive"]),
        (False, {"x": None}, ["x is None, expected a tensor"]),
        (False, {"x": np.ones((5, 37), np.float32)}, ["x is a ndarray, expected a tensor"]),
        (True, {"weight": None}, ["weight is None", "training=True"]),
        (False, {"qweight": None}, ["qweight is None", "training=False"]),
        (True, {"quant_config": None}, ["quant_config is None, expected a BitQuantConfig"]),
        (True, {"quant_config": "int8"}, ["quant_config is 'int8', expected a BitQuantConfig"]),
    ],
)
def test_forward(kernel: str, training: bool, changed: dict[str, Any], words: list[str]) -> None:
    forced = KernelRegistry.forced(*(["TorchKernel"] if kernel == "TorchKernel" else []))
    with forced, pytest.raises(QuantizationError) as caught:
        _forward(training, **changed)
    assert "\n" not in str(caught.value)
    for word in words:
        if not (kernel == "TorchKernel" and "dtype float32" in word):
            assert word in str(caught.value)


def test_other_functions() -> None:
    layer = make_layer(5)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    with pytest.raises(QuantizationError, match="unpack_weights"):
        base.dequantize_weight(qweight, scale, PER_TOKEN)
    with pytest.raises(QuantizationError, match=r"scale has shape \(5,\), expected \(5, 1\)"):
        base.quantize_x(layer.x, torch.ones(5), PER_TOKEN)
    with pytest.raises(QuantizationError, match="layout"):
        bitlinear.prepare_weights(layer.weight, PER_TOKEN, layout="3bit")
    with pytest.raises(QuantizationError, match="weight is None"):
        bitlinear.prepare_weights(None, PER_TOKEN)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="in_features"):
        base.unpack_weights(qweight, 0)
    with pytest.raises(QuantizationError, match="quant_config"):
        bitlinear.prepare_weights(layer.weight, None)  # type: ignore[arg-type]


def test_sparse_and_nested_arguments_of_other_functions() -> None:
    column, nested = torch.ones(2, 1).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 3)])
    calls: list[Callable[[], object]] = [
        lambda: base.quantize_x(torch.ones(2, 3), column, PER_TOKEN),
        lambda: base.quantize_x(torch.ones(2, 3), column, FLOAT32),
        lambda: base.quantize_weight(torch.ones(2, 3), torch.ones(1).to_sparse(), PER_TOKEN),
        lambda: base.unpack_weights(torch.ones(19, 16, dtype=torch.uint8).to_sparse(), 37),
        lambda: base.compute_x_scale(nested, PER_TOKEN),
        lambda: base.fake_quantize_x(nested, FLOAT32),
    ]
    for call in calls:
        with pytest.raises(QuantizationError, match=r"expected a dense one"):
            call()


@pytest.mark.parametrize("config", [PER_TOKEN, FLOAT32], ids=id_of)
def test_activations_and_their_scale_are_checked_for_every_dtype(config: BitQuantConfig) -> None:
    wrong_values: list[Any] = [None, torch.ones(3, 4, dtype=torch.int64)]
    x = torch.ones(3, 4) if config is FLOAT32 else torch.ones(3, 4, dtype=torch.int8)
    for wrong in wrong_values:
        for function in (base.quantize_x, base.dequantize_x):
            with pytest.raises(QuantizationError, match="x "):
                function(wrong, torch.ones(3, 1), config)
        with pytest.raises(QuantizationError, match="x "):
            base.fake_quantize_x(wrong, config)
    for scale in (torch.ones(3, 4, 1), torch.ones(3), torch.ones(3, 1).double()):
        with pytest.raises(QuantizationError, match="scale has"):
            base.quantize_x(torch.ones(3, 4), scale, config)
        with pytest.raises(QuantizationError, match="scale has"):
            base.dequantize_x(x, scale, config)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_without_columns(device: str) -> None:
    x, scale = torch.ones(3, 0, device=device), torch.ones(3, 1, device=device)
    for call in (base.compute_x_scale, base.fake_quantize_x):
        with pytest.raises(QuantizationError, match=r"x has shape \(3, 0\), expected at least one column"):
            call(x, PER_TOKEN)
    with pytest.raises(QuantizationError, match=r"x has shape \(3, 0\), expected at least one column"):
        base.quantize_x(x, scale, PER_TOKEN)
    with pytest.raises(QuantizationError):
        base.dequantize_x(x.to(torch.int8), scale, PER_TOKEN)
    assert base.compute_x_scale(x, FLOAT32).shape == (3, 1)


@pytest.mark.parametrize("x", [None, [[1.0]], np.ones((5, 37), np.float32)], ids=["None", "list", "ndarray"])
def test_a_bound_kernel_called_without_a_tensor(x: Any) -> None:
    scale, qweight = bitlinear.prepare_weights(make_layer().weight, PER_TOKEN)
    with pytest.raises(QuantizationError, match=r"x is (None|a list|a ndarray), expected a tensor"):
        KernelRegistry.get_kernel_for_config(PER_TOKEN)(x, scale, qweight)


def test_an_operator_of_another_device_refuses_native_kernels() -> None:
    layer = make_layer(5)
    with pytest.raises(KernelNotFoundError, match="TorchKernel"):
        _ops.torch_bitlinear_train(layer.x, layer.weight, None, *PER_TOKEN.flags, None, "Int8PortableKernel")


@pytest.mark.medium
def test_compiled_code_raises_the_same_text() -> None:
    torch.compiler.reset()
    layer = make_layer(5)
    scale, _ = bitlinear.prepare_weights(layer.weight, PER_TOKEN)

    @torch.compile(fullgraph=True)
    def infer(qweight: torch.Tensor) -> torch.Tensor:
        return bitlinear.forward(layer.x, None, scale, qweight, None, PER_TOKEN)

    codes = torch.zeros(19, 37, dtype=torch.int8)
    infer(codes)
    with pytest.raises(RuntimeError, match=r"^QuantizationError: qweight"):
        infer(codes + 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_of_zero_are_those_of_the_argument_on_every_device(device: str) -> None:
    config = BitQuantConfig()
    scale, qweight = (part.to(device) for part in bitlinear.prepare_weights(torch.randn(4, 16), config))
    with pytest.raises(QuantizationError, match="^x has 0 features, "):
        bitlinear.forward(torch.zeros(2, 0, device=device), None, scale, qweight, None, config)
    for shape, name in (((4, 0), "in_features"), ((0, 4), "out_features")):
        with pytest.raises(QuantizationError, match=f"^weight has 0 {name}, expected at least 1$"):
            bitlinear.prepare_weights(torch.zeros(shape, device=device), config)
