"""The kernels that BitLab brings."""

import json
from typing import Any

from bitcore.config import BitQuantConfig
from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.kernels.torch_kernel import TorchKernel
from bitcore.operators import native


class NativeKernel(OperatorKernel):
    """A compiled kernel of the engine: CPU only."""

    device_types = ("cpu",)

    def __init__(self, name: str, requirement: str, path: str, supported: bool, configs: list[list[Any]]) -> None:
        super().__init__()
        self.name = name
        self.requirement = requirement
        self.path = path
        self._supported = supported
        self._configs = frozenset(BitQuantConfig(*arguments) for arguments in configs)

    def is_supported(self) -> bool:
        """Whether this CPU has what the kernel needs."""
        return self._supported

    def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
        """Whether the kernel computes this config."""
        return quant_config in self._configs


_engine: dict[str, Any] = json.loads(native.list_kernels())

BUILTIN_KERNELS: tuple[OperatorKernel, ...] = (
    *(NativeKernel(**kernel) for kernel in _engine["kernels"]),
    TorchKernel(),
)
"""Every built-in kernel, whether it runs here or not, best first."""

FAMILY_NAMES: dict[str, str] = _engine["aliases"]
"""`Int8Kernel` and `Float32Kernel`, each with the name of the family's best kernel on this machine."""

CPU_FEATURES: list[str] = _engine["cpu_features"]
"""What this CPU has of what kernels may need."""


def tile_calls(name: str) -> int:
    """How many tiles a native kernel has computed in this process: proof of which kernel ran.

    Raises:
        KernelNotFoundError: no native kernel has this name.
    """
    return native.call(native.kernel_tile_calls, name)
