"""What earlier versions wrote is still read, and gives the bits that it gave: tests/data/earlier, by version 0.1.0."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

import bitcore  # noqa: F401 (its operators)
from bitcore.testing import assert_same_bits
from bitmodels import AutoBitModel
from support import ROOT

EARLIER = ROOT / "tests" / "data" / "earlier"


def test_a_program_that_was_exported_before_there_were_groups() -> None:
    """Its calls of the operators lack their last arguments: a deployed layer, one in evaluation, one that trains."""
    expected = load_file(EARLIER / "expected.safetensors")
    program = torch.export.load(EARLIER / "program.pt2").module()
    assert_same_bits(program(expected["x"]), expected["program"])
    program(expected["x"]).sum().backward()


def test_a_model_that_was_saved_before_there_were_groups() -> None:
    expected = load_file(EARLIER / "expected.safetensors")
    model = AutoBitModel.from_pretrained(EARLIER / "model")
    assert_same_bits(model(expected["x"]), expected["model"])
