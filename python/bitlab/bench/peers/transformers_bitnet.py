"""The BitLinear of Hugging Face's transformers: packed weights, unpacked and multiplied in bfloat16 at every call."""

import importlib
import importlib.util
from itertools import cycle

import torch
from torch import Tensor

from bitlab.bench.layer import WEIGHT_SCALE, Call, Layer, Prepared

MODULE = "transformers.integrations.bitnet"
CODES_PER_BYTE = 4


class TransformersBitLinear:
    """`transformers.integrations.bitnet.BitLinear`, in bfloat16 as its models are stored. It uses torch.compile."""

    name = "transformers BitLinear"
    group = "transformers"
    family = None

    def missing(self) -> str | None:
        """Where the package is not installed or does not load."""
        if importlib.util.find_spec("transformers") is None:
            return "the package transformers is not installed"
        try:
            importlib.import_module(MODULE)
        except ImportError as error:
            return f"{MODULE} cannot be imported: {error}"
        return None

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """It packs four output rows in a byte."""
        if out_features % CODES_PER_BYTE:
            return f"out_features {out_features} is no multiple of {CODES_PER_BYTE}"
        return None

    def prepare(self, layer: Layer) -> Prepared:
        """2 bits a weight."""
        bitnet = importlib.import_module(MODULE)
        packed = bitnet.pack_weights(layer.codes.clone())  # It changes its argument.
        modules = []
        for _ in range(layer.copies(packed.nbytes)):
            module = bitnet.BitLinear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            module.weight.copy_(packed)
            module.weight_scale.fill_(1 / WEIGHT_SCALE)  # It divides by its scales.
            modules.append(module.eval())

        def bind(x: Tensor) -> Call:
            inputs, turn = x.bfloat16(), cycle(modules)
            return lambda: next(turn)(inputs)

        return Prepared(packed.nbytes, bind)
