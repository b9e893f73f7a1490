"""Models of ternary layers: trained, saved and deployed in PyTorch; language models, run without it."""

from typing import TYPE_CHECKING

from bitmodels.checkpoints import convert_checkpoint, inspect_checkpoint
from bitmodels.language_model import LanguageModel
from bitmodels.native_model import Sampling

if TYPE_CHECKING:
    from bitmodels.auto import AutoBitModel
    from bitmodels.base import BitModelBase, BitModelConfig
    from bitmodels.mlp import BitMLPConfig, BitMLPModel
    from bitmodels.registry import list_models, register_model
else:

    def __getattr__(name: str) -> object:
        """Imports what needs torch; without torch it says what to install."""
        if name not in __all__:
            raise AttributeError(f"module 'bitmodels' has no attribute {name!r}")
        from bitmodels import _api

        return getattr(_api, name)


__all__ = [
    "AutoBitModel",
    "BitMLPConfig",
    "BitMLPModel",
    "BitModelBase",
    "BitModelConfig",
    "LanguageModel",
    "Sampling",
    "convert_checkpoint",
    "inspect_checkpoint",
    "list_models",
    "register_model",
]
