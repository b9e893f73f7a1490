"""Other people's checkpoints: what is in them. Reads safetensors and GGUF, without torch."""

from bitmodels.checkpoints.inspection import Group, Report, inspect_checkpoint

__all__ = ["Group", "Report", "inspect_checkpoint"]
