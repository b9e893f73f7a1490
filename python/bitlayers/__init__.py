"""Layers with ternary weights, and the way there from `nn.Linear`."""

from bitcore import _requirements as _requirements  # first: without torch it says what to install
from bitlayers.bitlinear import BitLinear
from bitlayers.convert import convert, deploy
from bitlayers.embedding import Int8Embedding, TernaryEmbedding
from bitlayers.int8_linear import Int8Linear
from bitlayers.packed_module import quantize_int8_rows
from bitlayers.summary import LayerSummary, Summary, summary

__all__ = [
    "BitLinear",
    "Int8Embedding",
    "Int8Linear",
    "LayerSummary",
    "Summary",
    "TernaryEmbedding",
    "convert",
    "deploy",
    "quantize_int8_rows",
    "summary",
]
