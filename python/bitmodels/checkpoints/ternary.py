"""Ternary matrices of other people's encodings: their codes, and scales in BitLab's form, bit for bit.

A scale of 0 has no codes: they become 0, and the scale 2^-14. A negative scale becomes its magnitude, and the codes
change their signs. Both are exact, and counted.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitcore.config import GROUP_SIZES, BitQuantConfig, Granularity
from bitcore.exceptions import FileError
from bitmodels.checkpoints.stored import Bytes, StoredTensor

Codes = NDArray[np.int8]  # (out_features, in_features) of -1, 0 and 1.

ZERO_SCALE = 2.0**-14

_SMALLEST_GROUP = GROUP_SIZES[0]
_CHUNK = 1 << 18  # Elements that are looked at together: they stay in a core's cache.

# The sign bit, the other bits, and the first magnitude that is not finite, of floats seen as integers.
_FLOAT_BITS: dict[str, tuple[np.dtype[Any], int, int]] = {
    "float32": (np.dtype("<u4"), 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
    "float16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
}


@dataclass
class ScaleChanges:
    """What had to be changed in scales: numbers of scales, and the largest relative error of those rounded."""

    zero: int = 0
    negative: int = 0
    rounded: int = 0
    largest_error: float = 0.0

    def add(self, other: "ScaleChanges") -> None:
        self.zero += other.zero
        self.negative += other.negative
        self.rounded += other.rounded
        self.largest_error = max(self.largest_error, other.largest_error)


@dataclass
class Grouping:
    """Over which weights a scale is shared, and the scales.

    `scale` is float32 () or (out_features,), or float16 (out_features, groups), finite and positive.
    """

    granularity: Granularity
    group_size: int
    scale: NDArray[Any]
    changes: ScaleChanges = field(default_factory=ScaleChanges)

    def config(self, activation_granularity: Granularity) -> BitQuantConfig:
        return BitQuantConfig(self.granularity, "int8", activation_granularity, self.group_size)


def widest_grouping(name: str, scales: NDArray[Any], group_size: int, in_features: int) -> Grouping:
    """The fewest scales that say the same as magnitudes (out_features, groups), where 0 stands for "any".

    Raises:
        FileError: a scale that no float16 comes near, where they stay scales of groups.
    """
    magnitudes = np.asarray(scales, np.float32)
    nonzero = magnitudes != 0
    largest = magnitudes.max(axis=1)
    by_row = not (nonzero & (magnitudes != largest[:, None])).any()
    if by_row and not ((largest != 0) & (largest != largest.max())).any():
        return Grouping("per_tensor", 128, *_positive(largest.max()))
    if by_row:
        return Grouping("per_channel", 128, *_positive(largest))
    for size in reversed(GROUP_SIZES):
        if size <= group_size or size >= in_features:
            continue
        merged, fits = _merged(magnitudes, size // group_size)
        if fits:
            return _group_scales(name, merged, size)
    return _group_scales(name, magnitudes, group_size)


def _merged(magnitudes: NDArray[Any], count: int) -> tuple[NDArray[Any], bool]:
    """The largest of each `count` adjacent magnitudes, and whether the others are the same or 0."""
    parts = _groups(magnitudes, count)
    largest = parts.max(axis=2)
    return largest, not ((parts != 0) & (parts != largest[:, :, None])).any()


def _groups(rows: NDArray[Any], size: int) -> NDArray[Any]:
    """Rows cut into groups of `size`, the last filled up with zeros."""
    if missing := -rows.shape[1] % size:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, size)


def _positive(scales: Any) -> tuple[NDArray[np.float32], ScaleChanges]:
    zero = scales == 0
    return np.where(zero, np.float32(ZERO_SCALE), scales).astype(np.float32), ScaleChanges(int(np.sum(zero)))


def _group_scales(name: str, magnitudes: NDArray[Any], group_size: int) -> Grouping:
    exact, changes = _positive(magnitudes)
    with np.errstate(over="ignore"):
        scale = exact.astype(np.float16)
    if not np.isfinite(scale).all() or not (scale > 0).all():
        worst = exact[~np.isfinite(scale) | (scale == 0)].flat[0]
        raise FileError(f"{name}: the scale {worst:g} of a group lies outside of float16")
    errors = np.abs(scale.astype(np.float32) - exact) / exact
    changes.rounded, changes.largest_error = int(np.count_nonzero(errors)), float(errors.max(initial=0.0))
    return Grouping("per_group", group_size, scale, changes)


# ---- floats that are ternary already ---------------------------------------------------------------------------------


def ternary_floats(tensor: StoredTensor) -> Grouping | None:
    """The grouping of floats (out_features, in_features) that are -1, 0 or +1 times one magnitude per group.

    The test is exact: w / alpha is -1, 0 or 1. None where no group size of BitQuantConfig passes it, or a weight is
    not finite.
    """
    bits, magnitude_bits, not_finite = float_bits(tensor)
    rows, columns = tensor.shape
    groups = -(-columns // _SMALLEST_GROUP)
    alphas = np.zeros((rows, groups), bits.dtype)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        parts = _groups(bits[first : first + step] & magnitude_bits, _SMALLEST_GROUP)
        largest = parts.max(axis=2)
        if (largest >= not_finite).any() or ((parts != 0) & (parts != largest[:, :, None])).any():
            return None
        alphas[first : first + step] = largest
    return widest_grouping(tensor.name, widened(alphas, tensor.encoding), _SMALLEST_GROUP, columns)


def codes_of_floats(tensor: StoredTensor) -> Codes:
    """The signs of floats: -1, 0 or 1."""
    bits, magnitude_bits, _ = float_bits(tensor)
    codes = np.empty(bits.shape, np.int8)
    step = max(1, _CHUNK // bits.shape[1])
    for first in range(0, len(bits), step):
        part = bits[first : first + step]
        nonzero = ((part & magnitude_bits) != 0).view(np.int8)
        negative = (part > magnitude_bits).view(np.int8)
        np.subtract(nonzero, 2 * (nonzero & negative), out=codes[first : first + step])
    return codes


def float_bits(tensor: StoredTensor) -> tuple[NDArray[Any], int, int]:
    """A floating tensor's elements as unsigned integers, the bits that are no sign, and the first that is infinite."""
    dtype, magnitude_bits, not_finite = _FLOAT_BITS[tensor.encoding]
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape), magnitude_bits, not_finite


def widened(bits: NDArray[Any], encoding: str) -> NDArray[np.float32]:
    """Floats, as float_bits() gives them, as float32."""
    if encoding == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32 if encoding == "float32" else np.float16).astype(np.float32)


# ---- packed bytes ----------------------------------------------------------------------------------------------------


def _four_fields(order: tuple[int, ...]) -> NDArray[np.uint32]:
    """Of every byte: its four fields as the bytes of a word, the field `order[0]` first."""
    fields = [[byte >> 2 * place & 3 for place in order] for byte in range(256)]
    return np.array(fields, np.uint8).view("<u4").ravel()


_IN_ORDER = _four_fields((0, 1, 2, 3))


def unpacked_rows(data: Bytes, rows: int) -> Codes:
    """transformers' packed rows, uint8 (ceil(rows / 4), in_features): row r of R holds rows r, R + r, 2 R + r, 3 R + r.

    Codes 0 to 3, minus one.
    """
    packed_rows, columns = data.shape
    fields = np.empty((4, packed_rows, columns), np.uint8)
    for place in range(4):
        np.right_shift(data, 2 * place, out=fields[place])
    fields &= 3
    fields -= 1
    return fields.view(np.int8).reshape(-1, columns)[:rows]


@dataclass(frozen=True)
class _Blocks:
    """An encoding with blocks: values and bytes of one, where its float16 scale is, and its codes."""

    values: int
    size: int
    scale: int
    codes: slice
    stride: int  # Values between the fields of a byte: 1, or 32 in runs of 128.


_BLOCKS = {
    "Q2_0 of 64": _Blocks(64, 18, 0, slice(2, 18), 1),
    "Q2_0 of 128": _Blocks(128, 34, 0, slice(2, 34), 1),
    "PQ2_0": _Blocks(128, 34, 0, slice(2, 34), 1),
    "TQ2_0": _Blocks(256, 66, 64, slice(0, 64), 32),
}
READ_ENCODINGS = (*_BLOCKS, "I2_S")


def encoded_scales(tensor: StoredTensor) -> tuple[NDArray[np.float32], int]:
    """Scales as they are stored, (out_features, groups), and the size of a group; I2_S: (1, 1) and in_features."""
    rows, columns = tensor.shape
    if tensor.encoding == "I2_S":
        return tensor.data[-32:-28].view("<f4").reshape(1, 1), columns
    form = _BLOCKS[tensor.encoding]
    blocks = tensor.data.reshape(-1, form.size)[:, form.scale : form.scale + 2]
    scales = np.ascontiguousarray(blocks).view("<f2").reshape(rows, columns // form.values)
    return scales.astype(np.float32), form.values


def encoded_codes(tensor: StoredTensor) -> Codes:
    """Codes 0 to 3, minus one, of one of READ_ENCODINGS."""
    rows, columns = tensor.shape
    if tensor.encoding == "I2_S":  # Runs of 128 values in 32 bytes; value p of them in the highest bits of byte p.
        return _strided(tensor.data[:-32].reshape(-1, 32), (6, 4, 2, 0)).reshape(rows, columns)
    form = _BLOCKS[tensor.encoding]
    data = tensor.data.reshape(-1, form.size)[:, form.codes]
    if form.stride == 1:
        fields = _IN_ORDER[data].view(np.uint8)
        fields -= 1
        return fields.view(np.int8).reshape(rows, columns)
    return _strided(data.reshape(-1, form.stride), (0, 2, 4, 6)).reshape(rows, columns)


def _strided(data: Bytes, shifts: tuple[int, ...]) -> Codes:
    """Of bytes (runs, stride): the fields (runs, 4, stride), minus one."""
    fields = np.empty((len(data), 4, data.shape[1]), np.uint8)
    for place, shift in enumerate(shifts):
        np.right_shift(data, shift, out=fields[:, place])
    fields &= 3
    fields -= 1
    return fields.view(np.int8)


# ---- stored scales ---------------------------------------------------------------------------------------------------


def stored_grouping(name: str, scales: NDArray[Any], group_size: int, in_features: int) -> Grouping:
    """The grouping of scales as they are stored, (out_features, groups).

    Raises:
        FileError: a scale is NaN or infinite.
    """
    if others := int((~np.isfinite(scales)).sum()):
        raise FileError(f"{name}: {others:,} of {scales.size:,} scales are NaN or infinite")
    grouping = widest_grouping(name, np.abs(scales), group_size, in_features)
    grouping.changes.zero, grouping.changes.negative = int((scales == 0).sum()), int((scales < 0).sum())
    return grouping


def apply_signs(name: str, codes: Codes, scales: NDArray[Any], group_size: int) -> Codes:
    """Codes whose scales are magnitudes: 0 where a scale is 0, negated where it is negative.

    Raises:
        FileError: a code 3 whose scale is not 0.
    """
    if (scales <= 0).any():
        signs = np.sign(scales).astype(np.int8).repeat(group_size, axis=1)[:, : codes.shape[1]]
        codes = np.where(signs == 0, np.int8(0), np.where((signs < 0) & (codes < 2), -codes, codes))
    if int(codes.max(initial=0)) > 1:
        raise FileError(f"{name}: {int((codes > 1).sum()):,} codes 3, expected 0, 1 and 2 (-1, 0 and +1)")
    return codes
