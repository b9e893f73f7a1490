"""Everything of torch that BitLab uses and torch does not document, each with what does instead where it is missing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad


def _find(owner: object, name: str, otherwise: Any) -> Any:
    return getattr(owner, name, otherwise)


# Inside, operators go straight to a device's own function. For calls of which no gradient is recorded: without it they
# pass autograd's, which is slower and does no more. Compilers cannot trace it, and need not.
below_autograd: Callable[[], AbstractContextManager[object]] = _find(
    torch._C, "_AutoDispatchBelowAutograd", nullcontext
)

# Whether torch.jit.trace is recording (documented, but not exported for type checkers).
is_tracing: Callable[[], bool] = _find(torch.jit, "is_tracing", lambda: False)

# Whether a transform of torch.func is active. Without it every autograd.Function takes torch's own, slower way.
_functorch_is_active: Callable[[], bool] = _find(torch._C, "_are_functorch_transforms_active", lambda: True)


def forward_mode_is_active() -> bool:
    """Whether forward-mode AD may have given a tensor a tangent; True where torch does not tell."""
    level: int = _find(forward_ad, "_current_level", 0)
    return level >= 0


class Function(torch.autograd.Function):
    """A torch.autograd.Function without what torch's `apply` does for functions of other kinds, at every call."""

    boxed_grads_call = False  # Torch asks for it in every backward, and a miss costs it an exception.

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's, which refuses the transforms of torch.func."""
        direct = _find(super(torch.autograd.Function, cls), "apply", None)
        if direct is None or _functorch_is_active():
            return super().apply(*args)
        return direct(*args)
