"""BitLab's core: ternary (1.58-bit) linear layers for training and inference.

What needs torch is imported when it is first used, or as soon as the program imports torch: programs that only read,
convert or run models start without it.
"""

import sys
from typing import TYPE_CHECKING

from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, FileError, KernelNotFoundError, QuantizationError, StateError

if TYPE_CHECKING or sys.modules.get("torch") is not None:
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
    from bitcore._after_torch import load_after_torch

    load_after_torch("bitcore._api")  # Programs that were exported use the operators, and import nothing but bitcore.

    def __getattr__(name: str) -> object:
        """Imports what needs torch; without torch it says what to install."""
        if name not in __all__:
            raise AttributeError(f"module 'bitcore' has no attribute {name!r}")
        from bitcore import _api

        return getattr(_api, name)


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
