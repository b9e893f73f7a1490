"""The names of bitcore that need torch, which importing this module imports."""

from bitcore import _requirements as _requirements  # says what to install
from bitcore.kernels import BitKernelBase, KernelRegistry, TorchKernel
from bitcore.ops import bitlinear
from bitcore.ops import weight_gradient as weight_gradient  # registers its operator: exported models use it
from bitcore.ops.base import (
    check_qweight,
    compute_weight_scale,
    compute_x_scale,
    dequantize_weight,
    dequantize_x,
    fake_quantize_weight,
    fake_quantize_x,
    pack_weights,
    quantize_weight,
    quantize_x,
    repack,
    unpack_weights,
)
from bitcore.ops.bitlinear import prepare_weights

__all__ = [
    "BitKernelBase",
    "KernelRegistry",
    "TorchKernel",
    "bitlinear",
    "check_qweight",
    "compute_weight_scale",
    "compute_x_scale",
    "dequantize_weight",
    "dequantize_x",
    "fake_quantize_weight",
    "fake_quantize_x",
    "pack_weights",
    "prepare_weights",
    "quantize_weight",
    "quantize_x",
    "repack",
    "unpack_weights",
]
