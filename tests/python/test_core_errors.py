"""Bad input that needs no value to be read: devices, layouts, Python types; the same texts compiled and plain."""

from typing import Any

import numpy as np
import pytest
import torch

from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import _ops, base, bitlinear
from core_helpers import PER_TOKEN, make_layer


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


def test_an_operator_of_another_device_refuses_native_kernels() -> None:
    layer = make_layer(5)
    with pytest.raises(KernelNotFoundError, match="TorchKernel"):
        _ops.torch_bitlinear_train(layer.x, layer.weight, None, *PER_TOKEN.flags, None, "Int8PortableKernel")


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
