"""BitLab's core: ternary (1.58-bit) linear layers for training and inference."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, FileError, KernelNotFoundError, QuantizationError, StateError

if TYPE_CHECKING or find_spec("torch") is not None:
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
else:

    def __getattr__(name: str) -> object:
        """Says what to install for what needs torch: nearly everything but reading checkpoints."""
        if name in __all__:
            from bitcore import _requirements as _requirements
        raise AttributeError(f"module 'bitcore' has no attribute {name!r}")


__all__ = [
    "BitKernelBase",
    "BitLabError",
    "BitQuantConfig",
    "FileError",
    "KernelNotFoundError",
    "KernelRegistry",
    "QuantizationError",
    "StateError",
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
