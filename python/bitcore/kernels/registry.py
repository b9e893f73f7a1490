"""Which kernels there are and which one serves a config."""

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.builtin import BUILTIN_KERNELS, FAMILY_NAMES

VARIABLE = "BITLAB_KERNEL"


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class _State:
    """What decides, and a token that changes with it: compiled code guards on the token.

    The token is empty while nothing but the built-in list decides, which `bitlinear.forward` asks on every call. It is
    text and not a number because torch.compile would generalize a number that it sees change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.user_kernels: tuple[BitKernelBase, ...] = ()  # latest first
        self.named = _split_names(os.environ.get(VARIABLE, ""))
        self.named_by = VARIABLE
        self.generation = 0
        self.token = self._token()

    def refresh(self) -> None:
        """Recomputes the token."""
        self.token = self._token()

    def _token(self) -> str:
        if not self.user_kernels and not self.named:
            return ""
        return f"{self.generation} {','.join(self.named)}"


STATE = _State()


def _all_kernels() -> tuple[BitKernelBase, ...]:
    return STATE.user_kernels + BUILTIN_KERNELS


def lookup(name: str) -> BitKernelBase | None:
    """A kernel by its name, whether it runs here or not."""
    resolved = FAMILY_NAMES.get(name, name)
    return next((kernel for kernel in _all_kernels() if kernel.name == resolved), None)


def known_names() -> str:
    """For error messages."""
    return ", ".join([*FAMILY_NAMES, *(kernel.name for kernel in _all_kernels())])


def find(name: str) -> BitKernelBase:
    """As lookup.

    Raises:
        KernelNotFoundError: the name is unknown.
    """
    kernel = lookup(name)
    if kernel is None:
        raise KernelNotFoundError(f"no kernel is named '{name}'; known: {known_names()}")
    return kernel


def candidates(config: BitQuantConfig, device_type: str) -> list[BitKernelBase]:
    """The kernels that a call may use, best first; never empty.

    Raises:
        KernelNotFoundError: no kernel covers the config; where kernels are named, none or more than one of them does.
    """
    if not STATE.named:
        fitting = [kernel for kernel in _all_kernels() if kernel.covers(config, device_type)]
        if not fitting:
            raise KernelNotFoundError(f"no kernel covers {config} on {device_type}")
        return fitting
    named_by = f"{STATE.named_by}={','.join(STATE.named)}"
    unknown = [name for name in STATE.named if lookup(name) is None]
    if unknown:
        raise KernelNotFoundError(f"{named_by} names '{unknown[0]}', which is no kernel; known: {known_names()}")
    named = [lookup(name) for name in STATE.named]
    fitting = [kernel for kernel in named if kernel is not None and kernel.covers(config, device_type)]
    if len(fitting) != 1:
        count = "more than one kernel" if fitting else "no kernel"
        raise KernelNotFoundError(f"{named_by} names {count} that runs {config} on {device_type}")
    return fitting


def select(config: BitQuantConfig, device_type: str, qweight: Tensor) -> BitKernelBase:
    """The first candidate that accepts the qweight. int8 codes are packed for a kernel of the standard form.

    Raises:
        KernelNotFoundError: as candidates.
        QuantizationError: no candidate accepts it.
    """
    fitting = candidates(config, device_type)
    for kernel in fitting:
        if kernel.accepts(qweight) or (qweight.dtype == torch.int8 and kernel.has_standard_form()):
            return kernel
    names = ", ".join(kernel.name for kernel in fitting)
    raise QuantizationError(
        f"qweight has dtype {qweight.dtype} and shape {tuple(qweight.shape)}, a form that no kernel for {config} "
        f"accepts (asked: {names})"
    )


def bind(kernel: BitKernelBase, config: BitQuantConfig | None) -> BitKernelBase:
    """A copy of the kernel, bound to the config."""
    bound = copy.copy(kernel)
    bound.quant_config = config
    return bound


class KernelRegistry:
    """The one registry of the process. All methods are thread-safe.

    User kernels come before the built-in ones, the latest first; the built-in list is explicit, best first. The
    environment variable BITLAB_KERNEL, read once when bitcore is imported, names the kernels to use instead, separated
    by commas, at most one for each activation dtype and device; user kernels then run only if named.

    Attributes:
        generation: Grows with every register and unregister.
    """

    generation: ClassVar[int] = 0

    @staticmethod
    def get_kernel_for_config(config: BitQuantConfig, device: str | torch.device = "cpu") -> BitKernelBase:
        """The kernel that a call with this config uses, bound to the config.

        Raises:
            KernelNotFoundError: names the config, and the variable where it decides.
        """
        return bind(candidates(require_config(config), torch.device(device).type)[0], config)

    @staticmethod
    def get_kernel_by_name(name: str, config: BitQuantConfig) -> BitKernelBase:
        """A kernel by its name, bound to the config. "Int8Kernel" and "Float32Kernel" name the best of their family.

        Raises:
            KernelNotFoundError: the name is unknown, this machine lacks what the kernel needs, or it does not fit the
                config.
        """
        require_config(config)
        kernel = find(name)
        if not kernel.is_supported():
            raise KernelNotFoundError(f"kernel {name} needs {kernel.requirement}, which this machine does not have")
        if not kernel.is_compatible_with(config):
            raise KernelNotFoundError(f"kernel {name} does not cover {config}")
        return bind(kernel, config)

    @staticmethod
    def list_available_kernels() -> list[str]:
        """Names of what runs here, best first, "Int8Kernel" and "Float32Kernel" included."""
        builtin = [kernel.name for kernel in BUILTIN_KERNELS if kernel.is_supported()]
        return [*(kernel.name for kernel in STATE.user_kernels), *FAMILY_NAMES, *builtin]

    @staticmethod
    def register(kernel: BitKernelBase | type[BitKernelBase]) -> None:
        """Adds a kernel, an instance or a class that takes no arguments, in front of all others.

        Compiled code that a registration concerns is compiled again.

        Raises:
            QuantizationError: it is no BitKernelBase.
            BitLabError: its name is taken.
        """
        instance = kernel() if isinstance(kernel, type) else kernel
        if not isinstance(instance, BitKernelBase):
            raise QuantizationError(f"kernel is a {type(instance).__name__}, expected a BitKernelBase")
        with STATE.lock:
            if instance.name in FAMILY_NAMES or any(instance.name == other.name for other in _all_kernels()):
                raise BitLabError(f"a kernel named '{instance.name}' is already registered")
            STATE.user_kernels = (instance, *STATE.user_kernels)
            _next_generation()

    @staticmethod
    def unregister(name: str) -> None:
        """Removes a registered kernel; built-in ones stay.

        Raises:
            KernelNotFoundError: no registered kernel has this name.
        """
        with STATE.lock:
            left = tuple(kernel for kernel in STATE.user_kernels if kernel.name != name)
            if len(left) == len(STATE.user_kernels):
                raise KernelNotFoundError(f"no registered kernel is named '{name}'")
            STATE.user_kernels = left
            _next_generation()

    @staticmethod
    @contextmanager
    def forced(*names: str) -> Iterator[None]:
        """Inside the block, in all threads, only the named kernels run: BITLAB_KERNEL for a while.

        Raises:
            KernelNotFoundError: a name is unknown.
        """
        for name in names:
            find(name)
        before = STATE.named, STATE.named_by
        _set_named(names, "KernelRegistry.forced")
        try:
            yield
        finally:
            _set_named(*before)


def _next_generation() -> None:
    STATE.generation += 1
    KernelRegistry.generation = STATE.generation
    STATE.refresh()


def _set_named(names: tuple[str, ...], named_by: str) -> None:
    with STATE.lock:
        STATE.named, STATE.named_by = names, named_by
        STATE.refresh()
