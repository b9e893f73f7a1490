"""How often each code occurs in a ternary tensor, and what its scales are, for every encoding that is known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitmodels.checkpoints.stored import Bytes, StoredTensor

Counts = NDArray[np.int64]  # Of the codes 0 (-1), 1 (0), 2 (+1) and 3, which is none.

CHUNK = 1 << 24  # Bytes that are counted at once.


@dataclass
class Codes:
    """What ternary tensors hold together."""

    counts: Counts = field(default_factory=lambda: np.zeros(4, np.int64))
    smallest_scale: float = float("inf")  # Of the magnitudes.
    largest_scale: float = 0.0
    zero_scales: int = 0
    negative_scales: int = 0
    other_scales: int = 0  # NaN and infinite.

    def add(self, other: "Codes") -> None:
        self.counts = self.counts + other.counts
        self.smallest_scale = min(self.smallest_scale, other.smallest_scale)
        self.largest_scale = max(self.largest_scale, other.largest_scale)
        self.zero_scales += other.zero_scales
        self.negative_scales += other.negative_scales
        self.other_scales += other.other_scales

    @property
    def invalid(self) -> int:
        return int(self.counts[3])

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of -1, 0 and +1 among the valid codes."""
        valid = self.counts[:3] / max(1, int(self.counts[:3].sum()))
        return float(valid[0]), float(valid[1]), float(valid[2])


def _fields(byte: int) -> list[int]:
    return [byte >> 2 * place & 3 for place in range(4)]


def _trits(byte: int, count: int) -> list[int]:
    """The highest first, as TQ1_0 codes them: ceil(256 v / 243), by multiplication with powers of three."""
    return [(byte * 3**place % 256 * 3) >> 8 for place in range(count)]


def _table(digits: Callable[[int], list[int]]) -> Counts:
    return np.array([np.bincount(digits(byte), minlength=4) for byte in range(256)])


_FIELDS = _table(_fields)
_FIVE_TRITS = _table(lambda byte: _trits(byte, 5))
_FIVE_DIGITS = _table(lambda byte: [byte // 3**place % 3 for place in range(5)] if byte < 243 else [3] * 5)
_FOUR_TRITS = _table(lambda byte: _trits(byte, 4))


def _count(data: Bytes, table: Counts) -> Counts:
    """Of all bytes of a view, each counted as the table says."""
    counts = np.zeros(256, np.int64)
    rows = max(1, CHUNK // max(1, data[0].size if data.ndim > 1 else 1))
    for first in range(0, len(data), rows):
        counts += np.bincount(np.ravel(data[first : first + rows]), minlength=256)
    counted: Counts = counts @ table
    return counted


# Of the encodings with blocks: bytes of a block, where its float16 scale is, and which bytes hold codes, by what table.
_BLOCKS: dict[str, tuple[int, int, list[tuple[slice, Counts]]]] = {
    "Q2_0 of 64": (18, 0, [(slice(2, 18), _FIELDS)]),
    "Q2_0 of 128": (34, 0, [(slice(2, 34), _FIELDS)]),
    "PQ2_0": (34, 0, [(slice(2, 34), _FIELDS)]),
    "TQ2_0": (66, 64, [(slice(0, 64), _FIELDS)]),
    "TQ1_0": (54, 52, [(slice(0, 48), _FIVE_TRITS), (slice(48, 52), _FOUR_TRITS)]),
    "PTQ1_0": (28, 26, [(slice(0, 24), _FIVE_TRITS), (slice(24, 26), _FOUR_TRITS)]),
}
TERNARY_ENCODINGS = (*_BLOCKS, "I2_S")


def codes_of(tensor: StoredTensor) -> Codes:
    """Of a tensor of GGUF in one of TERNARY_ENCODINGS."""
    if tensor.encoding == "I2_S":
        scale = tensor.data[-32:-28].view("<f4")
        return codes_with_scales(_count(tensor.data[:-32], _FIELDS), scale.astype(np.float64))
    size, place, parts = _BLOCKS[tensor.encoding]
    blocks = tensor.data.reshape(-1, size)
    scales = np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(np.float64)
    scales = scales.ravel()
    counts = np.zeros(4, np.int64)
    if (scales == 0).any():  # Whatever their codes are, the weights of such a block are 0.
        blocks = blocks[scales != 0]
    for part, table in parts:
        counts = counts + _count(blocks[:, part], table)
    counts[1] += tensor.numel - counts.sum()
    return codes_with_scales(counts, scales)


def codes_of_packed(tensor: StoredTensor, scale: NDArray[Any]) -> Codes:
    """Of the packed rows of transformers' BitNet, four codes in a byte."""
    return codes_with_scales(_count(tensor.data, _FIELDS), scale.astype(np.float64).ravel())


def codes_of_qweight(tensor: StoredTensor, scale: NDArray[Any]) -> Codes:
    """Of BitLab's own packed weights; docs/packed-format.md describes them.

    Raises:
        ValueError: they are none, or their trailer is damaged.
    """
    rows = tensor.shape[0]
    trailer = tensor.data[-rows * -(-64 // rows) :]
    tables = {1: _FIELDS, 2: _FIVE_DIGITS}
    if len(trailer) < 64 or bytes(trailer[:8]) != b"BITLABQW" or int(trailer[12]) not in tables:
        raise ValueError("no trailer")
    counts = _count(tensor.data[: -len(trailer)], tables[int(trailer[12])])
    padding = int(counts.sum()) - rows * int(trailer[24:32].view("<u8")[0])
    if not 0 <= padding < rows * 20:  # less than a step
        raise ValueError("the trailer has another in_features than the payload")
    counts[1] -= padding
    return codes_with_scales(counts, scale.astype(np.float64).ravel())


def codes_with_scales(counts: Counts, scales: NDArray[np.float64]) -> Codes:
    """The counts, and what is to be said of the scales."""
    finite = np.abs(scales[np.isfinite(scales) & (scales != 0)])
    return Codes(
        counts,
        float(finite.min(initial=np.inf)),
        float(finite.max(initial=0.0)),
        int((scales == 0).sum()),
        int((scales < 0).sum()),
        int((~np.isfinite(scales)).sum()),
    )
