"""Models of ternary layers that save, load and deploy; language models of others, converted (without torch)."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from bitmodels.checkpoints import convert_checkpoint, inspect_checkpoint

if TYPE_CHECKING or find_spec("torch") is not None:
    from bitmodels.auto import AutoBitModel
    from bitmodels.base import BitModelBase, BitModelConfig
    from bitmodels.mlp import BitMLPConfig, BitMLPModel
    from bitmodels.registry import list_models, register_model
else:

    def __getattr__(name: str) -> object:
        """Says what to install for what needs torch."""
        if name in __all__:
            from bitcore import _requirements as _requirements
        raise AttributeError(f"module 'bitmodels' has no attribute {name!r}")


__all__ = [
    "AutoBitModel",
    "BitMLPConfig",
    "BitMLPModel",
    "BitModelBase",
    "BitModelConfig",
    "convert_checkpoint",
    "inspect_checkpoint",
    "list_models",
    "register_model",
]
