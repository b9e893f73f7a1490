"""The layouts of a packed weight: bytes, inverses and results, by a definition in plain Python and by each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels.registry import KernelRegistry
from bitcore.operators import torch_ops
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear
from core_helpers import CONFIGS, PER_TOKEN, id_of, make_layer
from oracle import checksum

LAYOUTS = {"2bit": (1, 16), "1.6bit": (2, 20)}
"""Number in the trailer, and values of k that a 32-bit word holds."""


def exists(layout: str, in_features: int) -> bool:
    return layout == "2bit" or -(-in_features // 20) < -(-in_features // 16)


def slow_pack(codes: Tensor, layout: str) -> Tensor:
    """docs/packed-format.md, a byte at a time."""
    (rows, cols), (number, step_size) = codes.shape, LAYOUTS[layout]
    worth, digits = (4, 4) if layout == "2bit" else (3, 5)
    padded = [[int(code) + 1 for code in row] + [1] * (-cols % step_size) for row in codes]
    payload = bytearray()
    for first in range(0, rows, 16):
        for step in range(0, len(padded[0]), step_size):
            for row in padded[first : first + 16]:
                for byte in range(4):
                    payload.append(sum(row[step + 4 * digit + byte] * worth**digit for digit in range(digits)))
    fields = ((1, 4), (number, 4), (rows, 8), (cols, 8), (checksum(bytes(payload)), 8))
    trailer = b"BITLABQW" + b"".join(value.to_bytes(size, "little") for value, size in fields)
    trailer = trailer.ljust(rows * -(-64 // rows), b"\0")
    return torch.from_numpy(np.frombuffer(bytes(payload) + trailer, np.uint8).copy()).view(rows, -1)


@given(out_features=st.integers(1, 40), in_features=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_bytes_are_the_documented_ones(out_features: int, in_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator).to(torch.int8)
    packed = {}
    for layout in filter(lambda name: exists(name, in_features), LAYOUTS):
        packed[layout] = base.pack_weights(codes, layout)
        assert torch.equal(packed[layout], slow_pack(codes, layout))
        assert torch.equal(packed[layout], torch_ops.pack_weights(codes, layout))
        assert torch.equal(base.unpack_weights(packed[layout], in_features), codes)
        assert torch.equal(torch_ops.unpack_weights(packed[layout], in_features), codes)
    for source in packed.values():
        for target, expected in packed.items():
            assert torch.equal(base.repack(source, in_features, target), expected)
    assert torch.equal(base.pack_weights(codes), packed["2bit"])


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_layouts_give_the_same_bits_by_every_kernel(config: BitQuantConfig) -> None:
    kernels = [
        name for name in KernelRegistry.list_available_kernels() if name.startswith(("Int8", "Float32", "Ref", "Torch"))
    ]
    for rows, out_features, in_features in ((1, 16, 80), (3, 33, 67), (14, 70, 1001), (40, 5, 333)):
        layer = make_layer(rows, out_features=out_features, in_features=in_features)
        scale, two_bit = bitlinear.prepare_weights(layer.weight, config, layout="2bit")
        same_scale, base3 = bitlinear.prepare_weights(layer.weight, config, layout="1.6bit")
        assert torch.equal(scale, same_scale)
        assert base3.numel() < two_bit.numel()
        checked = 0
        for name in kernels:
            try:
                kernel = KernelRegistry.get_kernel_by_name(name, config)
            except LookupError:
                continue
            y = kernel(layer.x, scale, base3, layer.bias)
            if config.activation_dtype == "int8":
                assert_same_bits(y, kernel(layer.x, scale, two_bit, layer.bias), name)
            else:
                torch.testing.assert_close(y, kernel(layer.x, scale, two_bit, layer.bias), rtol=1e-5, atol=1e-4)
            checked += 1
        assert checked >= 4


def test_a_layer_takes_either_layout() -> None:
    layer = BitLinear(100, 30, quant_config=PER_TOKEN).eval()
    x = torch.randn(7, 100)
    expected = layer(x)
    state = layer.deploy().state_dict()
    state["qweight"] = base.repack(state["qweight"], 100, "1.6bit")
    fresh = BitLinear(100, 30, quant_config=PER_TOKEN)
    fresh.load_state_dict(state)
    assert fresh.is_deployed
    assert torch.equal(fresh.qweight, state["qweight"])  # type: ignore[arg-type]
    assert_same_bits(fresh(x), expected)
    inputs = x.clone().requires_grad_()
    fresh(inputs).sum().backward()
    again = x.clone().requires_grad_()
    layer(again).sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, again.grad)  # type: ignore[arg-type]


def test_a_layout_that_does_not_exist_for_a_width() -> None:
    for in_features in (1, 16, 21, 32, 48, 64):
        codes = torch.zeros(2, in_features, dtype=torch.int8)
        for pack in (base.pack_weights, torch_ops.pack_weights):
            with pytest.raises(QuantizationError, match=rf"1\.6bit.*{in_features} in_features"):
                pack(codes, "1.6bit")


def test_compiled_code_reads_both_layouts() -> None:
    layer = make_layer(3, out_features=20, in_features=90)
    forward = torch.compile(bitlinear.forward, fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS:
        scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN, layout=layout)
        y = forward(layer.x, qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
        expected = bitlinear.forward(layer.x, qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
        assert_same_bits(y, expected, layout)
