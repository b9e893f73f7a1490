"""Modules of torch that read a child's `weight` and go past its forward: attention and encoder layers.

Their fast paths compute with the float weight of `linear1` and `linear2`, and `nn.MultiheadAttention` always does with
that of `out_proj`. What they get from a `BitLinear` instead is no tensor but overrides torch's functions, for which
their fast paths step aside (they then call the layer), and `nn.MultiheadAttention` calls what raises here.

Adapters of PEFT that start from the float weight, or are merged into it, are told that a deployed layer has none.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bitcore.exceptions import QuantizationError, StateError

_READERS = frozenset({"torch.nn.modules.activation", "torch.nn.modules.transformer"})

# PEFT's modules that compute with a weight. Others look at its dtype and device alone, and None is an answer to them.
_PEFT = "peft."
_ADAPTERS = "peft.tuners."
_ADAPTER_MODULES = (".layer", ".variants", ".dora")
_ADAPTER_UTILITIES = "peft.utils.integrations"


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


def refuse_adapters() -> None:
    """Refuses a deployed layer's weight to the caller's caller, if that is an adapter that computes with it.

    Raises:
        StateError
    """
    frame = sys._getframe(2)
    module: str = frame.f_globals.get("__name__") or ""
    if module == _ADAPTER_UTILITIES or (module.startswith(_ADAPTERS) and module.endswith(_ADAPTER_MODULES)):
        raise StateError(
            f"PEFT's {frame.f_code.co_name}() computes with the float weight of a layer that is deployed and has none: "
            "LoRA and rsLoRA train on packed weights, and are not merged into them; the rest needs trainable layers"
        )


def is_read_by_peft() -> bool:
    """Whether the caller's caller is PEFT, which takes a layer that has a `qweight`, even if it is None, for packed."""
    module: str = sys._getframe(2).f_globals.get("__name__") or ""
    return module.startswith(_PEFT)
