"""The operators: compiled against plain torch, opcheck, packing, autocast."""

import subprocess
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from bitcore import _library
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import _ops, _torch_ops, base, bitlinear
from bitcore.testing import assert_same_bits
from core_helpers import CONFIGS, DTYPES, PER_TOKEN, id_of, make_layer

all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- compiled against plain torch ------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4095), (5, 4096), (5, 4097), (17, 5000), (1, 70_001)])
def test_base_operations_have_the_same_bits(shape: tuple[int, int], per_channel: bool, dtype: torch.dtype) -> None:
    weight = make_layer(out_features=shape[0], in_features=shape[1], dtype=dtype).weight
    scale = _ops.compute_weight_scale(weight, per_channel)
    assert_same_bits(scale, _torch_ops.compute_weight_scale(weight, per_channel))
    codes = _ops.quantize_weight(weight, scale, per_channel)
    assert torch.equal(codes, _torch_ops.quantize_weight(weight, scale, per_channel))
    assert_same_bits(
        _ops.dequantize_weight(codes, scale, per_channel), _torch_ops.dequantize_weight(codes, scale, per_channel)
    )
    x_scale = _ops.compute_x_scale(weight, True, per_channel)
    assert_same_bits(x_scale, _torch_ops.compute_x_scale(weight, True, per_channel))
    qx = _ops.quantize_x(weight, x_scale, per_channel)
    assert torch.equal(qx, _torch_ops.quantize_x(weight, x_scale, per_channel))
    assert_same_bits(_ops.dequantize_x(qx, x_scale, per_channel), _torch_ops.dequantize_x(qx, x_scale, per_channel))
    for ours, plain in zip(
        _ops.prepare_weights(weight, per_channel), _torch_ops.prepare_weights(weight, per_channel), strict=True
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("per_channel", [False, True])
def test_values_that_are_not_finite(value: float, per_channel: bool) -> None:
    weight = make_layer().weight
    weight[3, 5] = value
    for scale_of in (_ops.compute_weight_scale, _torch_ops.compute_weight_scale):
        scale = scale_of(weight, per_channel)
        assert torch.equal(scale.isnan().nonzero().flatten(), torch.tensor([3]) if per_channel else torch.tensor([]))
        codes = _ops.quantize_weight(weight, scale, per_channel)
        assert not codes[3 if per_channel else slice(None)].any()
    for x_scale_of in (_ops.compute_x_scale, _torch_ops.compute_x_scale):
        x_scale = x_scale_of(weight, True, per_channel)
        assert x_scale.isnan().sum() == 1
        assert not _ops.quantize_x(weight, x_scale, per_channel)[3].any()


@given(
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 200),
    rows=st.integers(0, 9),
    config=st.sampled_from(CONFIGS),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-42, 1e-6, 1.0, 1e30]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_has_the_same_bits(
    out_features: int,
    in_features: int,
    rows: int,
    config: BitQuantConfig,
    dtype: torch.dtype,
    magnitude: float,
    has_bias: bool,
    seed: int,
) -> None:
    layer = make_layer(rows, out_features=out_features, in_features=in_features, seed=seed)
    x, bias = (layer.x * magnitude).to(dtype), layer.bias if has_bias else None
    y, *saved = _ops.bitlinear_train(x, layer.weight, bias, *config.flags)
    plain_y, *plain_saved = _ops.torch_bitlinear_train(x, layer.weight, bias, *config.flags)
    for ours, plain in zip(saved, plain_saved, strict=True):
        assert torch.equal(ours.nan_to_num(), plain.nan_to_num())
    scale, qweight = _ops.prepare_weights(layer.weight, config.flags[0])
    assert_same_bits(_ops.bitlinear(x, scale, qweight, bias, *config.flags), y)
    assert_same_bits(_ops.torch_bitlinear(x, scale, qweight, bias, *config.flags), plain_y)
    if config.activation_dtype == "int8":
        assert_same_bits(y, plain_y)
    else:
        torch.testing.assert_close(y, plain_y, equal_nan=True)


@pytest.mark.parametrize("in_features", [131_071, 131_072, 262_143])
def test_torch_kernel_is_exact_where_float32_sums_are_not(in_features: int) -> None:
    x = torch.full((1, in_features), -1.0)
    x[0, -1] = 0.9999  # code 127: the sum is odd
    codes = torch.ones(2, in_features, dtype=torch.int8)
    y = _ops.torch_bitlinear(x, torch.ones(()), codes, None, False, True, False)
    qx = _ops.quantize_x(x, _ops.compute_x_scale(x, True, False), False)
    total = torch.tensor(int(qx.long().sum()), dtype=torch.int32).float()
    assert torch.equal(y, (total * (torch.ones(()) / torch.tensor(127.0))).expand(1, 2))
    assert_same_bits(_ops.bitlinear(x, torch.ones(()), codes, None, False, True, False), y)


# ---- packing ---------------------------------------------------------------------------------------------------------


@given(out_features=st.integers(1, 70), in_features=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_packing_is_the_same_everywhere_and_inverse(out_features: int, in_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator).to(torch.int8)
    packed = base.pack_weights(codes)
    assert packed.shape == (out_features, 4 * -(-in_features // 16) + -(-64 // out_features))
    assert torch.equal(packed, _torch_ops.pack_weights(codes))
    assert torch.equal(base.unpack_weights(packed, in_features), codes)
    assert torch.equal(_torch_ops.unpack_weights(packed, in_features), codes)
    assert torch.equal(base.repack(packed, in_features, "2bit"), packed)


@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_every_damaged_byte_is_found(position: int, flip: int) -> None:
    packed = _packed()
    flat = packed.view(-1)
    flat[position % len(flat)] ^= flip
    for check in (base.check_qweight, _torch_ops.check_qweight):
        with pytest.raises(QuantizationError, match="qweight"):
            check(packed, 37)


def _packed() -> Tensor:
    return bitlinear.prepare_weights(make_layer().weight, PER_TOKEN)[1]


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
        (_ops.bitlinear, _ops.bitlinear_train),
        (_ops.torch_bitlinear, _ops.torch_bitlinear_train),
    ):
        opcheck(inference, (x, scale, qweight, bias, *config.flags))
        opcheck(inference, (x[0, 0].detach(), scale, codes, None, *config.flags, torch.bfloat16))
        opcheck(training, (x, weight, bias, *config.flags))


@pytest.mark.medium
@pytest.mark.parametrize("per_channel", [False, True])
def test_opcheck_of_the_base_operations(per_channel: bool) -> None:
    x, weight, _ = make_layer(2, 3)
    scale, qweight = _ops.prepare_weights(weight, per_channel)
    codes, x_scale = _ops.quantize_weight(weight, scale, per_channel), _ops.compute_x_scale(x, True, per_channel)
    opcheck(_ops.compute_weight_scale, (weight, per_channel))
    opcheck(_ops.quantize_weight, (weight, scale, per_channel))
    opcheck(_ops.dequantize_weight, (codes, scale, per_channel))
    opcheck(_ops.compute_x_scale, (x, True, per_channel))
    opcheck(_ops.compute_x_scale, (x, False, per_channel))
    opcheck(_ops.quantize_x, (x, x_scale, per_channel))
    opcheck(_ops.dequantize_x, (_ops.quantize_x(x, x_scale, per_channel), x_scale, per_channel))
    opcheck(_ops.prepare_weights, (weight, per_channel))
    opcheck(_ops.pack_weights, (codes,))
    opcheck(_ops.unpack_weights, (qweight, weight.shape[1]))
    opcheck(_ops.check_qweight, (qweight, weight.shape[1]))
    opcheck(_ops.attach_gradient, (x.clone().requires_grad_(), x.clone().half().requires_grad_()))


# ---- devices, autocast -----------------------------------------------------------------------------------------------


def test_other_devices_have_functions_and_fakes() -> None:
    layer = make_layer(5)
    scale, qweight = (tensor.to("meta") for tensor in bitlinear.prepare_weights(layer.weight, PER_TOKEN))
    y = bitlinear.forward(layer.x.to("meta"), qweight_scale=scale, qweight=qweight, quant_config=PER_TOKEN)
    assert y.is_meta
    assert y.shape == (5, 19)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("bitlinear", "bitlinear_train", "prepare_weights", "quantize_x", "unpack_weights"):
        assert has_kernel(f"bitcore::{name}", "CompositeExplicitAutograd")


def test_values_that_are_wrong_give_nan_where_raising_would_synchronize(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, tried on a CPU: the check that raises is taken out."""
    monkeypatch.setattr(_torch_ops, "raise_faults", lambda faults: None)
    layer = make_layer(4)
    scale, qweight = bitlinear.prepare_weights(layer.weight, PER_TOKEN)
    run = _torch_ops.bitlinear
    assert run(layer.x, scale, qweight, None, *PER_TOKEN.flags).isfinite().all()
    for bad_scale in (0.0, -1.0, torch.nan, torch.inf):
        assert run(layer.x, torch.tensor(bad_scale), qweight, None, *PER_TOKEN.flags).isnan().all()
    damaged = qweight.clone()
    damaged.view(-1)[19 * 12] ^= 1  # the trailer's first byte
    assert run(layer.x, scale, damaged, None, *PER_TOKEN.flags).isnan().all()
    invalid = qweight.clone()
    invalid.view(-1)[7] |= 3
    assert run(layer.x, scale, invalid, None, *PER_TOKEN.flags).isnan().all()


@all_configs
def test_autocast_decides_the_output_dtype_alone(config: BitQuantConfig) -> None:
    layer = make_layer(4)
    scale, qweight = bitlinear.prepare_weights(layer.weight, config)

    def both_modes() -> list[Tensor]:
        return [
            bitlinear.forward(layer.x, layer.weight, bias=layer.bias, quant_config=config, training=True),
            bitlinear.forward(layer.x, None, scale, qweight, layer.bias, config),
        ]

    wide = both_modes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = both_modes()
        plain = _ops.torch_bitlinear(layer.x, scale, qweight, layer.bias, *config.flags)
    for y, expected in zip(narrow, wide, strict=True):
        assert_same_bits(y, expected.to(torch.bfloat16))
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, wide[1])


# ---- the shared object -----------------------------------------------------------------------------------------------


def test_shared_object_uses_the_stable_abi_only() -> None:
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", _library.PATH], capture_output=True, text=True, check=True
    ).stdout
    for namespace in ("at::", "c10::", "torch::", "GOMP_", "omp_", "Py_", "PyObject"):
        assert namespace not in undefined


def test_missing_shared_object_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "PATH", _library.PATH.with_name("missing.so"))
    with pytest.raises(ImportError, match=r"missing\.so\): run `make build`") as caught:
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
