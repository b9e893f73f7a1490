"""The operators: compiled against plain torch, opcheck, packing, autocast."""

import subprocess
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from bitcore import _library
from bitcore.config import BitQuantConfig
from bitcore.exceptions import KernelNotFoundError
from bitcore.operators import native, torch_ops
from bitcore.ops import base, bitlinear
from bitcore.testing import assert_same_bits
from core_helpers import CONFIGS, DTYPES, PER_TOKEN, id_of, make_layer

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- compiled against plain torch ------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("scales", [(False, 0), (True, 0), (False, 32), (False, 128), (False, 256)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4095), (5, 4096), (5, 4097), (17, 5000), (1, 70_001)])
def test_base_operations_have_the_same_bits(
    shape: tuple[int, int], scales: tuple[bool, int], dtype: torch.dtype
) -> None:
    """scales: whether per channel, and the size of groups."""
    weight = make_layer(out_features=shape[0], in_features=shape[1], dtype=dtype).weight
    scale = native.compute_weight_scale(weight, *scales)
    assert_same_bits(scale, torch_ops.compute_weight_scale(weight, *scales))
    codes = native.quantize_weight(weight, scale, *scales)
    assert torch.equal(codes, torch_ops.quantize_weight(weight, scale, *scales))
    assert_same_bits(
        native.dequantize_weight(codes, scale, *scales), torch_ops.dequantize_weight(codes, scale, *scales)
    )
    x_scale = native.compute_x_scale(weight, True, *scales)
    assert_same_bits(x_scale, torch_ops.compute_x_scale(weight, True, *scales))
    qx = native.quantize_x(weight, x_scale, *scales)
    assert torch.equal(qx, torch_ops.quantize_x(weight, x_scale, *scales))
    assert_same_bits(native.dequantize_x(qx, x_scale, *scales), torch_ops.dequantize_x(qx, x_scale, *scales))
    per_channel, group_size = scales
    for ours, plain in zip(
        native.prepare_weights(weight, per_channel, "auto", group_size),
        torch_ops.prepare_weights(weight, per_channel, "auto", group_size),
        strict=True,
    ):
        assert torch.equal(ours, plain)


@given(
    config=st.sampled_from(CONFIGS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 20),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 150),
    magnitude=st.sampled_from([1e-30, 1.0, 1e4]),
    has_bias=st.booleans(),
)
def test_training_saves_and_returns_the_same_tensors(
    config: BitQuantConfig,
    dtype: torch.dtype,
    rows: int,
    out_features: int,
    in_features: int,
    magnitude: float,
    has_bias: bool,
) -> None:
    """What each of the two training operators keeps for its backward: codes of x, their scale, packed weight, scale."""
    layer = make_layer(rows, out_features=out_features, in_features=in_features)
    x, bias = (layer.x * magnitude).to(dtype), layer.bias if has_bias else None
    y, *saved = native.bitlinear_train(x, layer.weight, bias, *config.operator_arguments())
    plain_y, *plain_saved = native.torch_bitlinear_train(x, layer.weight, bias, *config.operator_arguments())
    assert len(saved) == len(plain_saved) == 4
    for ours, plain in zip(saved, plain_saved, strict=True):
        assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
        assert torch.equal(ours, plain)
    scale, qweight = bitlinear.prepare_weights(layer.weight, config)
    assert torch.equal(saved[2], qweight)
    assert_same_bits(saved[3], scale)
    assert_same_bits(native.bitlinear(x, scale, qweight, bias, *config.operator_arguments()), y)
    assert_same_bits(native.torch_bitlinear(x, scale, qweight, bias, *config.operator_arguments()), plain_y)
    if config.activation_dtype == "int8":  # The oracle's bounds judge the others.
        assert_same_bits(y, plain_y)


@all_configs
def test_operators_return_float32_under_autocast(config: BitQuantConfig) -> None:
    """Autocast is for the layer's function to ask for; inside an operator it lowers no precision."""
    layer = make_layer(4)
    scale, qweight = bitlinear.prepare_weights(layer.weight, config)
    inference, training = (
        (native.bitlinear, native.torch_bitlinear),
        (native.bitlinear_train, native.torch_bitlinear_train),
    )

    def outputs() -> list[torch.Tensor]:
        inferred = [op(layer.x, scale, qweight, layer.bias, *config.operator_arguments()) for op in inference]
        return inferred + [op(layer.x, layer.weight, layer.bias, *config.operator_arguments())[0] for op in training]

    outside = outputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outputs()
    for y, expected in zip(inside, outside, strict=True):
        assert y.dtype == torch.float32
        assert_same_bits(y, expected)


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(
    ("config", "dtype"),
    [*((config, torch.float32) for config in CONFIGS), (PER_TOKEN, torch.bfloat16), (PER_TOKEN, torch.float16)],
    ids=lambda value: id_of(value) if isinstance(value, BitQuantConfig) else str(value),
)
def test_opcheck_of_the_layer(config: BitQuantConfig, dtype: torch.dtype) -> None:
    layer = make_layer(2, 3)
    x = layer.x.to(dtype).requires_grad_()
    weight, bias = layer.weight.requires_grad_(), layer.bias.requires_grad_()
    scale, qweight = bitlinear.prepare_weights(weight, config)
    codes = base.quantize_weight(weight, scale, config)
    for inference, training in (
        (native.bitlinear, native.bitlinear_train),
        (native.torch_bitlinear, native.torch_bitlinear_train),
    ):
        opcheck(inference, (x, scale, qweight, bias, *config.operator_arguments()))
        opcheck(inference, (x[0, 0].detach(), scale, codes, None, *config.operator_arguments(torch.bfloat16)))
        opcheck(training, (x, weight, bias, *config.operator_arguments()))


@pytest.mark.medium
@pytest.mark.parametrize("per_channel", [False, True])
def test_opcheck_of_the_base_operations(per_channel: bool) -> None:
    x, weight, _ = make_layer(2, 3)
    scale, qweight = native.prepare_weights(weight, per_channel)
    codes, x_scale = native.quantize_weight(weight, scale, per_channel), native.compute_x_scale(x, True, per_channel)
    opcheck(native.compute_weight_scale, (weight, per_channel))
    opcheck(native.quantize_weight, (weight, scale, per_channel))
    opcheck(native.dequantize_weight, (codes, scale, per_channel))
    opcheck(native.compute_x_scale, (x, True, per_channel))
    opcheck(native.compute_x_scale, (x, False, per_channel))
    opcheck(native.quantize_x, (x, x_scale, per_channel))
    opcheck(native.dequantize_x, (native.quantize_x(x, x_scale, per_channel), x_scale, per_channel))
    opcheck(native.prepare_weights, (weight, per_channel))
    opcheck(native.pack_weights, (codes,))
    opcheck(native.unpack_weights, (qweight, weight.shape[1]))
    opcheck(native.check_qweight, (qweight, weight.shape[1]))
    opcheck(native.attach_gradient, (x.clone().requires_grad_(), x.clone().half().requires_grad_()))


# ---- devices, autocast -----------------------------------------------------------------------------------------------


def test_other_devices_have_functions_and_fakes() -> None:
    layer = make_layer(5)
    scale, qweight = (tensor.to("meta") for tensor in bitlinear.prepare_weights(layer.weight, PER_TOKEN))
    y = bitlinear.forward(layer.x.to("meta"), qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
    x, weight = layer.x.to("meta"), layer.weight.to("meta")
    trained = bitlinear.forward(x, weight, quant_config=PER_TOKEN, training=True)
    assert y.is_meta
    assert trained.is_meta
    assert y.shape == trained.shape == (5, 19)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("bitlinear", "bitlinear_train", "prepare_weights", "quantize_x", "unpack_weights"):
        assert has_kernel(f"bitcore::{name}", "CompositeExplicitAutograd")


def test_values_that_are_wrong_give_nan_where_raising_would_synchronize(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, tried on a CPU: the check that raises is taken out."""
    monkeypatch.setattr(torch_ops, "raise_faults", lambda faults: None)
    layer = make_layer(4)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    run = torch_ops.bitlinear
    assert run(layer.x, scale, qweight, None, *PER_TOKEN.flags).isfinite().all()
    for bad_scale in (0.0, -1.0, torch.nan, torch.inf):
        assert run(layer.x, torch.tensor(bad_scale), qweight, None, *PER_TOKEN.flags).isnan().all()
    damaged = qweight.clone()
    damaged.view(-1)[19 * 12] ^= 1  # the trailer's first byte
    assert run(layer.x, scale, damaged, None, *PER_TOKEN.flags).isnan().all()
    invalid = qweight.clone()
    invalid.view(-1)[7] |= 3
    assert run(layer.x, scale, invalid, None, *PER_TOKEN.flags).isnan().all()


# ---- the shared object -----------------------------------------------------------------------------------------------


def test_shared_object_uses_the_stable_abi_only() -> None:
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", _library.PATH], capture_output=True, text=True, check=True
    ).stdout
    for namespace in ("at::", "c10::", "torch::", "GOMP_", "omp_", "Py_", "PyObject"):
        assert namespace not in undefined


def test_missing_shared_object_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "PATH", _library.PATH.with_name("missing.so"))
    with pytest.raises(
        ImportError, match=r"^bitcore's torch operators have not been built \(.*missing\.so\): run `make build`$"
    ) as caught:
        _library.load()
    assert "\n" not in str(caught.value)


def test_an_operator_called_directly_raises_a_runtime_error_that_names_the_class() -> None:
    layer = make_layer(1)
    with pytest.raises(RuntimeError, match=r"^QuantizationError: x has 37 features, weight expects 36$"):
        torch.ops.bitcore.bitlinear_train(layer.x, layer.weight[:, 1:], None, *PER_TOKEN.flags)
    with pytest.raises(RuntimeError, match=r"^KernelNotFoundError: .*NoKernel"):
        torch.ops.bitcore.bitlinear_train(layer.x, layer.weight, None, *PER_TOKEN.flags, kernel_name="NoKernel")
    with pytest.raises(RuntimeError, match=r"^QuantizationError: scale is None"):
        torch.ops.bitcore.quantize_weight(layer.weight, None, False)


def test_an_operator_of_another_device_refuses_native_kernels() -> None:
    layer = make_layer(5)
    with pytest.raises(KernelNotFoundError, match="TorchKernel"):
        native.torch_bitlinear_train(layer.x, layer.weight, None, *PER_TOKEN.flags, None, "Int8PortableKernel")


@pytest.mark.parametrize("name", ["config", "quant_config"])
def test_a_config_may_be_called_by_either_name(name: str) -> None:
    config = BitQuantConfig(weight_granularity="per_channel")
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    keyword: Any = {name: config}
    scale, x_scale = base.compute_weight_scale(weight, **keyword), base.compute_x_scale(x, **keyword)
    assert torch.equal(scale, base.compute_weight_scale(weight, config))
    codes, x_codes = base.quantize_weight(weight, scale, **keyword), base.quantize_x(x, x_scale, **keyword)
    floats, x_floats = base.dequantize_weight(codes, scale, **keyword), base.dequantize_x(x_codes, x_scale, **keyword)
    assert torch.equal(base.fake_quantize_weight(weight, **keyword), floats)
    assert torch.equal(base.fake_quantize_x(x, **keyword), x_floats)
    assert torch.equal(bitlinear.prepare_weights(weight, **keyword)[1], base.pack_weights(codes))
    both: Any = {"config": config, "quant_config": config}
    with pytest.raises(TypeError, match="both"):
        base.compute_weight_scale(weight, **both)
    with pytest.raises(TypeError, match="multiple values"):
        base.compute_weight_scale(weight, config, **keyword)
