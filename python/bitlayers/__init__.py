"""Layers with ternary weights, and the way there from `nn.Linear`."""

from bitlayers.bitlinear import BitLinear
from bitlayers.convert import convert, deploy

__all__ = ["BitLinear", "convert", "deploy"]
