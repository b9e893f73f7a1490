"""How a weight is initialized: by name, or by any function that fills a tensor in place."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from bitcore.exceptions import QuantizationError

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
        QuantizationError: the name is unknown.
    """
    if callable(method):
        return method
    if method not in _METHODS:
        raise QuantizationError(f"Unknown initialization method: init_method is {method!r}, expected {list(_METHODS)}")
    return _METHODS[method]
