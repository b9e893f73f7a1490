"""Tests that any kernel must pass: `check_kernel`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, all_configs
from bitcore.exceptions import QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.registry import bind, find
from bitcore.operators import checks, native
from bitcore.ops.packing import repack

__all__ = ["assert_same_bits", "check_kernel"]

_SIZES = ((1, 1), (2, 15), (16, 16), (17, 63), (33, 64), (65, 257))
_ROWS = (0, 1, 2, 13)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    what: str


def check_kernel(kernel: BitKernelBase | type[BitKernelBase] | str, device: str | torch.device = "cpu") -> None:
    """Runs the contract of docs/contract.md on a kernel, for every config that it covers.

    int8 activations: the same bits as the contract's plain torch operations; float32 activations: within the bound of
    float32 summation. Over odd shapes, dtypes, leading dimensions, strides, extreme and non-finite activations, with
    and without bias, in both layouts of the standard form, from several threads.

    Args:
        kernel: An instance, a class that takes no arguments, or a name that the registry knows.
        device: Where the tensors are.

    Raises:
        AssertionError: names the kernel, the config and the case.
    """
    instance = find(kernel) if isinstance(kernel, str) else kernel() if isinstance(kernel, type) else kernel
    configs = [config for config in all_configs() if instance.covers(config, torch.device(device).type)]
    assert configs, f"{instance.name} covers no config on {device}"
    for config in configs:
        _check_binding(instance, config, torch.device(device))
        for case in _cases(torch.device(device)):
            _check_case(instance, config, case)
        _check_threads(instance, config, torch.device(device))


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Shape, dtype and every bit are equal; a NaN equals any NaN.

    Raises:
        AssertionError
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    differ = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    differ &= ~(actual.isnan() & expected.isnan())
    count = int(differ.sum())
    assert count == 0, f"{what}: {count} of {actual.numel()} outputs have other bits"


def _cases(device: torch.device) -> Iterator[_Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for index, (out_features, in_features) in enumerate(_SIZES):
        weight, bias = normal(out_features, in_features), normal(out_features)
        for rows in _ROWS:
            x = normal(rows, in_features).to(_DTYPES[(index + rows) % 3])
            yield _Case(x, weight, bias if rows % 2 else None, f"x {tuple(x.shape)} {x.dtype}")
        yield _Case(normal(in_features), weight, bias, "1-D x")
        yield _Case(normal(2, 3, in_features).half(), weight, bias.half(), "two leading dimensions, float16 bias")
        yield _Case(normal(in_features, 3).t(), weight, bias, "x with stride 1 in the first dimension")
        yield _Case(normal(3, 2 * in_features)[:, ::2], weight, bias, "x with every other column")
        extreme = torch.ones(2, in_features, device=device)
        yield _Case(-extreme, weight.sign(), bias, "extreme activations")
        yield _Case(0 * extreme, weight, None, "zeros")
        yield _Case(1e30 * normal(2, in_features), weight, bias, "huge activations")
        yield _Case(1e-40 * normal(2, in_features), 1e-40 * weight, bias, "denormals")
        for value in (torch.nan, torch.inf):
            x = normal(3, in_features)
            x[1, -1] = value
            yield _Case(x, weight, bias, f"{value} in a row")


def _expected(config: BitQuantConfig, case: _Case) -> tuple[Tensor, Tensor]:
    """The contract's y, and how far a float32 kernel may be from it."""
    scale, qweight = native.prepare_weights(case.weight, config.flags[0], "auto", config.weight_group_size)
    y = native.torch_bitlinear(case.x, scale, qweight, case.bias, *config.operator_arguments())
    codes = native.unpack_weights(qweight, case.weight.shape[1])
    weight = native.dequantize_weight(codes, scale, config.flags[0], config.weight_group_size)
    magnitude = case.x.double().abs() @ weight.double().abs().t()
    summation = (case.weight.shape[1] + 4) * 2.0**-23 * magnitude
    rounding = torch.finfo(y.dtype).eps * y.double().abs() + torch.finfo(y.dtype).tiny
    return y, summation + rounding


def _check_case(kernel: BitKernelBase, config: BitQuantConfig, case: _Case) -> None:
    what = f"{kernel.name}, {config}, weight {tuple(case.weight.shape)}, {case.what}"
    scale, qweight = kernel.prepare_weights(case.weight, config)
    assert kernel.accepts(qweight), f"{what}: the kernel does not accept the qweight that it prepared"
    arguments = [tensor for tensor in (case.x, scale, qweight, case.bias) if tensor is not None]
    before = [tensor.clone() for tensor in arguments]
    y = kernel(case.x, scale, qweight, case.bias, config)
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), f"{what}: an argument was written to"
    expected, tolerance = _expected(config, case)
    if kernel.has_standard_form() and checks.has_layout("1.6bit", case.weight.shape[1]):
        smaller = repack(qweight, case.weight.shape[1], "1.6bit")
        _compare(config, kernel(case.x, scale, smaller, case.bias, config), expected, tolerance, f"{what}, 1.6bit")
    _compare(config, y, expected, tolerance, what)


def _compare(config: BitQuantConfig, y: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    if config.activation_dtype == "int8":
        assert_same_bits(y, expected, what)
        return
    assert y.shape == expected.shape, f"{what}: shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
    assert y.dtype == expected.dtype, f"{what}: dtype {y.dtype}, expected {expected.dtype}"
    close = (y.double() - expected.double()).abs() <= tolerance
    same = (y.isnan() & expected.isnan()) | (y == expected) | close
    assert bool(same.all()), f"{what}: outputs differ by more than float32 summation explains"


def _check_binding(kernel: BitKernelBase, config: BitQuantConfig, device: torch.device) -> None:
    weight, x = torch.ones(2, 3, device=device), torch.ones(1, 3, device=device)
    scale, qweight = kernel.prepare_weights(weight, config)
    try:
        bind(kernel, None)(x, scale, qweight)
    except QuantizationError:
        pass
    else:
        raise AssertionError(f"{kernel.name}: a call without any config raises no QuantizationError")
    assert_same_bits(bind(kernel, config)(x, scale, qweight), kernel(x, scale, qweight, None, config), kernel.name)


def _check_threads(kernel: BitKernelBase, config: BitQuantConfig, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(33, 65, generator=generator).to(device)
    inputs = [torch.randn(5, 65, generator=generator).to(device) for _ in range(8)]
    scale, qweight = kernel.prepare_weights(weight, config)
    alone = [kernel(x, scale, qweight, None, config) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: kernel(x, scale, qweight, None, config), inputs))
    for y, expected in zip(together, alone, strict=True):
        assert_same_bits(y, expected, f"{kernel.name}, {config}, from four threads")
