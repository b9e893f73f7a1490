"""Bad input that needs no value to be read: devices, layouts, Python types; the same texts compiled and plain."""

from typing import Any

import numpy as np
import pytest
import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.operators import native
from bitcore.ops import base, bitlinear
from core_helpers import PER_TOKEN, id_of, make_layer

FLOAT32 = BitQuantConfig("per_tensor", "float32", "per_channel")


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
        native.torch_bitlinear_train(layer.x, layer.weight, None, *PER_TOKEN.flags, None, "Int8PortableKernel")


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
