"""Every changed byte of a packed weight: check_qweight refuses it; forward refuses it or reads ternary weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear

CHECKSUM = 32  # its offset in the trailer; forward reads neither it nor the zeros behind it
CONFIG = BitQuantConfig(activation_granularity="per_channel")


def forward(x: torch.Tensor, qweight: torch.Tensor) -> torch.Tensor | None:
    """y, or None where the call refuses the weight."""
    try:
        return bitlinear.forward(x, qweight_scale=torch.tensor(0.5), qweight=qweight, quant_config=CONFIG)
    except QuantizationError:
        return None


def ternary_codes(qweight: torch.Tensor, x_of_ones: torch.Tensor) -> torch.Tensor | None:
    """The weight as forward reads it: one unit vector a row of x. None where it refuses."""
    y = forward(x_of_ones, qweight)
    return None if y is None else (y / 0.5).round().T


@pytest.mark.parametrize(("layout", "n", "k"), [("2bit", 2, 3), ("2bit", 5, 19), ("1.6bit", 5, 19), ("1.6bit", 2, 40)])
def test_every_changed_byte(layout: str, n: int, k: int) -> None:
    rng = np.random.default_rng([92, n, k])
    codes = torch.from_numpy(rng.integers(-1, 2, (n, k)).astype(np.int8))
    whole = bitlinear.pack_weights(codes, layout=layout)
    unit = torch.eye(k)
    assert torch.equal(ternary_codes(whole, unit), codes.float())  # type: ignore[arg-type]
    payload = whole.numel() - n * -(-64 // n)
    outcomes = {"refused": 0, "read": 0}
    for i in range(whole.numel()):
        for change in (*(1 << bit for bit in range(8)), int(rng.integers(1, 256)), 0xFF):
            damaged = whole.clone()
            damaged.view(-1)[i] ^= change
            for read in (bitlinear.check_qweight, bitlinear.unpack_weights):
                with pytest.raises(QuantizationError):
                    read(damaged, k)
            seen = ternary_codes(damaged, unit)
            outcomes["refused" if seen is None else "read"] += 1
            if i >= payload:
                assert (seen is not None) == (i >= payload + CHECKSUM)
                assert seen is None or torch.equal(seen, codes.float())
            elif seen is not None:
                assert torch.isin(seen, torch.tensor([-1.0, 0.0, 1.0])).all()
                # All codes but those of one byte are the same.
                assert (seen != codes).sum() <= 5
    assert min(outcomes.values()) > 0
