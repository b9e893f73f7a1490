"""transformers and BitLab: importing this module makes "bitlab" a quantization method of transformers.

    import bitlayers.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)  # trainable or deployed, as it was saved
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=BitLabConfig())  # of float weights

`bitlayers.convert()` and `bitlayers.deploy()` of a model of transformers import it by themselves.
docs/guides/transformers.md tells the rest.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from bitlayers.transformers.config import METHOD, BitLabConfig
from bitlayers.transformers.quantizer import BitLabQuantizer

register_quantization_config(METHOD)(BitLabConfig)
register_quantizer(METHOD)(BitLabQuantizer)

__all__ = ["BitLabConfig"]
