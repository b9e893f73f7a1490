"""Kernels and their registry."""

from bitcore import _requirements as _requirements  # first: without torch it says what to install
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.registry import KernelRegistry
from bitcore.kernels.torch_kernel import TorchKernel

__all__ = ["BitKernelBase", "KernelRegistry", "TorchKernel"]
