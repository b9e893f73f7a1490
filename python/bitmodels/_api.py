"""The names of bitmodels that need torch, which importing this module imports."""

from bitcore import _requirements as _requirements  # says what to install
from bitmodels.auto import AutoBitModel
from bitmodels.base import BitModelBase, BitModelConfig
from bitmodels.mlp import BitMLPConfig, BitMLPModel
from bitmodels.registry import list_models, register_model

__all__ = [
    "AutoBitModel",
    "BitMLPConfig",
    "BitMLPModel",
    "BitModelBase",
    "BitModelConfig",
    "list_models",
    "register_model",
]
