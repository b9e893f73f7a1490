"""Models of ternary layers that save, load and deploy."""

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
