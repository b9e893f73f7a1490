"""One argument under two names: some documented functions call a config `config`, others `quant_config`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {"config", "quant_config"}


def either_config_name(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function take its config by either keyword.

    Raises:
        TypeError: (when called) the config is given under both names, or by position and by name.
    """
    (name,) = _NAMES & inspect.signature(function).parameters.keys()
    (other,) = _NAMES - {name}

    @functools.wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
        if other in kwargs:
            keywords: dict[str, Any] = {**kwargs}
            if name in keywords:
                raise TypeError(f"{function.__name__}() got both {name} and {other}: they are one argument")
            keywords[name] = keywords.pop(other)
            return function(*args, **keywords)
        return function(*args, **kwargs)

    return renamed
