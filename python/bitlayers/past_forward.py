"""Modules of torch that read a child's `weight` and go past its forward: attention and encoder layers.

Their fast paths compute with the float weight of `linear1` and `linear2`, and `nn.MultiheadAttention` always does with
that of `out_proj`. What they get from a `BitLinear` instead is no tensor but overrides torch's functions, for which
their fast paths step aside (they then call the layer), and `nn.MultiheadAttention` calls what raises here.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bitcore.exceptions import QuantizationError

_READERS = frozenset({"torch.nn.modules.activation", "torch.nn.modules.transformer"})


class TernaryWeight:
    """Stands for the weight of a `BitLinear` where it would be used as a float matrix."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuses the function that got it as an argument.

        Raises:
            QuantizationError
        """
        name = getattr(function, "__name__", str(function))
        raise QuantizationError(
            f"{name} uses the weight of a BitLinear as a float matrix, past the layer's forward: "
            "out_proj of nn.MultiheadAttention has to be an nn.Linear"
        )


def is_read_past_forward() -> bool:
    """Whether the caller's caller is one of those modules of torch."""
    return sys._getframe(2).f_globals.get("__name__") in _READERS
