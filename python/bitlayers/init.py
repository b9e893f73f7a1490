"""How a weight is initialized: by name, or by any function that fills a tensor in place."""

import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitcore.exceptions import QuantizationError, StateError

InitMethod = str | Callable[[Tensor], object]

_METHODS: dict[str, Callable[[Tensor], object]] = {
    # nn.Linear's own: uniform in +-1/sqrt(in_features).
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "normal": partial(nn.init.normal_, std=0.02),
    "orthogonal": nn.init.orthogonal_,
}


def find_init_method(method: InitMethod) -> Callable[[Tensor], object]:
    """The function that fills a weight in place.

    Raises:
        QuantizationError: the name is unknown, or it is neither a name nor a function.
    """
    if callable(method):
        return method
    if not isinstance(method, str) or method not in _METHODS:
        raise QuantizationError(f"Unknown initialization method: init_method is {method!r}, expected {list(_METHODS)}")
    return _METHODS[method]


class Portable:
    """An init_method on its way through copy or pickle, which does not take every function (a lambda, say)."""

    def __init__(self, method: InitMethod) -> None:
        self.method = method

    def __deepcopy__(self, memo: dict[int, Any]) -> "Portable":
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        try:
            pickle.dumps(self.method)
        except (pickle.PicklingError, AttributeError, TypeError):
            return Portable, (LostInitMethod(repr(self.method)),)
        return Portable, (self.method,)


class LostInitMethod:
    """Stands for a function that could not be pickled with its layer."""

    def __init__(self, description: str) -> None:
        self.description = description

    def __call__(self, weight: Tensor) -> None:
        """Initializes nothing.

        Raises:
            StateError
        """
        raise StateError(f"init_method {self.description} could not be pickled with its layer: set init_method again")
