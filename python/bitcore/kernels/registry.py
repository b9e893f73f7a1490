"""Which kernels there are and which one serves a config."""

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.builtin import BUILTIN_KERNELS, FAMILY_NAMES
from bitcore.kernels.served import Served, served
from bitcore.operators import checks

VARIABLE = "BITLAB_KERNEL"


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class Naming(NamedTuple):
    """The kernels that a call has to use, and who says so. No names: the registry's order decides."""

    names: tuple[str, ...]
    by: str

    def __str__(self) -> str:
        return f"{self.by}={','.join(self.names)}"


class Choice(NamedTuple):
    """What decides which kernel runs, at one moment: a call reads it once, whatever other threads do meanwhile."""

    user_kernels: tuple[Served, ...]  # latest first
    naming: Naming


class _State:
    """What decides, and a token that changes with it: compiled code guards on the token.

    The token is empty while nothing but the built-in list decides, which `bitlinear.forward` asks on every call. It is
    text and not a number because torch.compile would generalize a number that it sees change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self._by_variable = Naming(_split_names(os.environ.get(VARIABLE, "")), VARIABLE)
        self._forced: dict[object, Naming] = {}  # every open `forced` block's, the latest last
        self.choice = Choice((), self._by_variable)
        self.token = ""
        self._decide()

    def set_user_kernels(self, kernels: tuple[Served, ...]) -> None:
        """Replaces the registered kernels. The caller holds the lock."""
        self.generation += 1
        self.choice = self.choice._replace(user_kernels=kernels)
        self._decide()

    def push(self, naming: Naming) -> object:
        """Lets the naming decide until its handle, which is returned, is removed."""
        handle = object()
        with self.lock:
            self._forced[handle] = naming
            self._decide()
        return handle

    def remove(self, handle: object) -> None:
        """Takes a naming away; the latest of those that are left decides."""
        with self.lock:
            del self._forced[handle]
            self._decide()

    def _decide(self) -> None:
        naming = next(reversed(self._forced.values()), self._by_variable)
        self.choice = self.choice._replace(naming=naming)
        decides = self.choice.user_kernels or naming.names
        self.token = f"{self.generation} {','.join(naming.names)}" if decides else ""


_state = _State()
_builtin = tuple(served(kernel) for kernel in BUILTIN_KERNELS)


def selection() -> str:
    """Text that changes with what decides which kernel runs; empty while the built-in list alone does.

    Compiled code that has read it is compiled again when it changes.
    """
    return _state.token


def naming() -> Naming:
    """The kernels that have to be used now, and who says so."""
    return _state.choice.naming


def user_kernels() -> list[BitKernelBase]:
    """The registered kernels, latest first."""
    return [entry.kernel for entry in _state.choice.user_kernels]


def _find(name: str, user_kernels: tuple[Served, ...], says: str) -> Served:
    resolved = FAMILY_NAMES.get(name, name)
    kernels = user_kernels + _builtin
    for entry in kernels:
        if entry.kernel.name == resolved:
            return entry
    known = ", ".join([*FAMILY_NAMES, *(entry.kernel.name for entry in kernels)])
    raise KernelNotFoundError(f"{says}; known: {known}")


def find(name: str) -> BitKernelBase:
    """A kernel by its name, whether it runs here or not.

    Raises:
        KernelNotFoundError: the name is unknown.
    """
    return _find(name, _state.choice.user_kernels, f"no kernel is named '{name}'").kernel


def candidates(config: BitQuantConfig, device_type: str) -> list[Served]:
    """The kernels that a call may use, best first; never empty.

    Raises:
        KernelNotFoundError: no kernel covers the config; where kernels are named, none or more than one of them does.
    """
    user_kernels, naming = _state.choice
    if not naming.names:
        fitting = [entry for entry in user_kernels + _builtin if entry.kernel.covers(config, device_type)]
        if not fitting:
            raise KernelNotFoundError(f"no kernel covers {config} on {device_type}")
        return fitting
    named = [_find(name, user_kernels, f"{naming} names '{name}', which is no kernel") for name in naming.names]
    fitting = [entry for entry in named if entry.kernel.covers(config, device_type)]
    if len(fitting) != 1:
        count = "more than one kernel" if fitting else "no kernel"
        raise KernelNotFoundError(f"{naming} names {count} that runs {config} on {device_type}")
    return fitting


def select(config: BitQuantConfig, device_type: str, qweight: Tensor) -> Served:
    """The first candidate that takes the qweight.

    Raises:
        KernelNotFoundError: as candidates.
        QuantizationError: no candidate accepts it.
    """
    fitting = candidates(config, device_type)
    for entry in fitting:
        if entry.takes(qweight):
            return entry
    checks.dense("qweight", qweight)
    names = ", ".join(entry.kernel.name for entry in fitting)
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
            KernelNotFoundError: names the config, and the variable where it decides; or torch knows no such device.
        """
        return bind(candidates(require_config(config), _device_type(device))[0].kernel, config)

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
        return [*(kernel.name for kernel in user_kernels()), *FAMILY_NAMES, *builtin]

    @staticmethod
    def all_kernels() -> list[BitKernelBase]:
        """Every registered and built-in kernel, whether it runs here or not, best first."""
        return [*user_kernels(), *BUILTIN_KERNELS]

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
        entry = served(instance)
        with _state.lock:
            if instance.name in (*FAMILY_NAMES, *(other.name for other in KernelRegistry.all_kernels())):
                raise BitLabError(f"a kernel named '{instance.name}' is already registered")
            _set_user_kernels((entry, *_state.choice.user_kernels))

    @staticmethod
    def unregister(name: str) -> None:
        """Removes a registered kernel; built-in ones stay.

        Raises:
            KernelNotFoundError: no registered kernel has this name.
        """
        with _state.lock:
            left = tuple(entry for entry in _state.choice.user_kernels if entry.kernel.name != name)
            if len(left) == len(_state.choice.user_kernels):
                raise KernelNotFoundError(f"no registered kernel is named '{name}'")
            _set_user_kernels(left)

    @staticmethod
    @contextmanager
    def forced(*names: str) -> Iterator[None]:
        """Inside the block, in all threads, only the named kernels run: BITLAB_KERNEL for a while.

        Of blocks that are open at once, the one entered last decides, in whatever order they end.

        Raises:
            KernelNotFoundError: a name is unknown.
        """
        for name in names:
            find(name)
        handle = _state.push(Naming(names, "KernelRegistry.forced"))
        try:
            yield
        finally:
            _state.remove(handle)


def _set_user_kernels(kernels: tuple[Served, ...]) -> None:
    _state.set_user_kernels(kernels)
    KernelRegistry.generation = _state.generation


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise KernelNotFoundError(f"no kernel runs on {device!r}: torch knows no such device") from None
