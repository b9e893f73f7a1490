"""Which class a saved model's `model_type` names."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from bitcore.exceptions import QuantizationError

if TYPE_CHECKING:
    from bitmodels.base import BitModelBase

Model = TypeVar("Model", bound="type[BitModelBase]")

_MODELS: dict[str, "type[BitModelBase]"] = {}

# What earlier versions wrote.
_FORMER_NAMES = {"BitMLPModel": "bit_mlp"}


def register_model(model_type: str) -> Callable[[Model], Model]:
    """Class decorator: makes a model known to `AutoBitModel` under a name, which its saved config carries.

    ```python
    @register_model("my_model")
    class MyModel(BitModelBase):
        config_class = MyConfig
    ```

    Raises:
        QuantizationError: the name is no text, empty, or taken; the class is no `BitModelBase` with a `config_class`;
            another model uses the same `config_class`.
    """
    if not isinstance(model_type, str) or not model_type:
        raise QuantizationError(f'model_type is {model_type!r}, expected a name: @register_model("my_model")')

    def register(model: Model) -> Model:
        config_class = getattr(model, "config_class", None)
        if not isinstance(model, type) or not dataclasses.is_dataclass(config_class):
            raise QuantizationError(f"register_model: {model!r} is no BitModelBase with a config_class")
        if (name := current_name(model_type)) in _MODELS:
            raise QuantizationError(f'model_type "{model_type}" is taken by {_MODELS[name].__name__}')
        taken = [name for name, other in _MODELS.items() if other.config_class is model.config_class]
        if taken:
            raise QuantizationError(f'{model.config_class.__name__} is the config of model_type "{taken[0]}" already')
        _MODELS[model_type] = model
        model.model_type = model_type
        return model

    return register


def current_name(model_type: str) -> str:
    """The name that a model has today, for one that it was saved with."""
    return _FORMER_NAMES.get(model_type, model_type)


def unregister_model(model_type: str) -> None:
    """Forgets a model.

    Raises:
        QuantizationError: the name is unknown.
    """
    find_model(model_type)
    del _MODELS[model_type]


def list_models() -> list[str]:
    """The names of all registered models, in the order of their registration."""
    return list(_MODELS)


def find_model(model_type: str) -> "type[BitModelBase]":
    """The class of a name.

    Raises:
        QuantizationError: the name is unknown.
    """
    if model_type not in _MODELS:
        raise QuantizationError(f'model_type is "{model_type}", expected one of {list_models()}')
    return _MODELS[model_type]


def find_model_of(config: object) -> "type[BitModelBase]":
    """The class whose `config_class` is the config's type.

    Raises:
        QuantizationError: no registered model has such a config.
    """
    for model in _MODELS.values():
        if type(config) is model.config_class:
            return model
    raise QuantizationError(f"config is a {type(config).__name__}, which belongs to none of {list_models()}")
