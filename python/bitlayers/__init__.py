"""Layers with ternary weights, and the way there from `nn.Linear`."""

from bitcore import _requirements as _requirements  # first: without torch it says what to install
from bitlayers.bitlinear import BitLinear
from bitlayers.convert import convert, deploy
from bitlayers.summary import LayerSummary, Summary, summary

__all__ = ["BitLinear", "LayerSummary", "Summary", "convert", "deploy", "summary"]
