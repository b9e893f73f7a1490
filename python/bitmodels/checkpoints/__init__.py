"""Other people's checkpoints: what is in them, and BitLab's form of them. No torch.

inspect_checkpoint(path)              what a GGUF file, a safetensors file or a directory of Hugging Face holds
convert_checkpoint(source, target)    a directory that BitLab and transformers load
"""

from bitmodels.checkpoints.conversion import Conversion, convert_checkpoint
from bitmodels.checkpoints.inspection import Group, Report, inspect_checkpoint

__all__ = ["Conversion", "Group", "Report", "convert_checkpoint", "inspect_checkpoint"]
