"""The packed weight in plain torch operations: any device, no synchronization except where noted.

docs/packed-format.md describes the bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bitcore.exceptions import QuantizationError
from bitcore.operators.checks import MIN_TRAILER_BYTES, STEP_CODES, ceil_div, layout_of, payload_row_bytes

TILE_ROWS = 16

_MAGIC = int.from_bytes(b"BITLABQW", "little")
_VERSION = 1
_LAYOUT_NUMBERS = {"2bit": 1, "1.6bit": 2}
_CHECKSUM_BASE = 0x9E3779B97F4A7C15 - 2**64
_HEADER_BYTES = 40  # five words of 64 bits: magic, version and layout, out_features, in_features, checksum
_MOST_BASE3_BYTE = 3**5 - 1


class Fault(NamedTuple):
    """Something wrong in values: a one-element bool tensor, and what to say where it is true.

    A `{}` in the message stands for `value`, which is read only then.
    """

    found: Tensor
    message: str
    value: Tensor | None = None


def raise_faults(faults: list[Fault]) -> None:
    """Raises the first fault that is found. Synchronizes the device.

    Raises:
        QuantizationError
    """
    for fault in faults:
        if fault.found:
            raise QuantizationError(fault.message.format("" if fault.value is None else int(fault.value)))


def pack(codes: Tensor, layout: str = "2bit") -> Tensor:
    """int8 codes (N, K) of -1, 0, 1 to a packed weight, uint8 (N, R + T)."""
    out_features, in_features = codes.shape
    padded = functional.pad(codes + 1, (0, -in_features % STEP_CODES[layout]), value=1).to(torch.uint8)
    places = _places(layout, codes)
    words = (padded.view(out_features, -1, len(places), 4) * places[:, None]).sum(2, dtype=torch.uint8)
    payload = _interleave(words)
    return torch.cat([payload, _trailer(payload, out_features, in_features, layout)]).view(out_features, -1)


def unpack(qweight: Tensor, in_features: int) -> tuple[Tensor, list[Fault]]:
    """Inverse of pack: codes int8 (N, K), with what a kernel's own reading finds wrong: trailer and codes."""
    fields, invalid = _fields(qweight, in_features)
    codes = fields[:, :in_features].to(torch.int8) - 1
    return codes, [*trailer_faults(qweight, in_features), Fault(invalid, "qweight holds an invalid code")]


def _fields(qweight: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """What is stored, padding included, uint8 (N, steps * codes of a step); and whether something is no code."""
    out_features = qweight.shape[0]
    layout = _layout(qweight, in_features)
    payload, _ = _split(qweight, in_features)
    words = _deinterleave(payload, out_features).unsqueeze(2)
    if layout == "2bit":
        fields = (words >> torch.arange(0, 8, 2, device=qweight.device, dtype=torch.uint8)[:, None]) & 3
        invalid = (fields == 3).any()
    else:
        fields = words.div(_places(layout, qweight)[:, None], rounding_mode="floor") % 3
        invalid = (words > _MOST_BASE3_BYTE).any()
    return fields.view(out_features, -1), invalid


def trailer_faults(qweight: Tensor, in_features: int) -> list[Fault]:
    """What the trailer says against reading qweight as (N, in_features), in constant time."""
    out_features = qweight.shape[0]
    words = _words(_split(qweight, in_features)[1][:_HEADER_BYTES])
    expected = _version_and_layout(_layout(qweight, in_features))
    return [
        Fault(words[0] != _MAGIC, "qweight has no trailer of a packed weight"),
        Fault(words[1] != expected, "qweight has a trailer of an unknown version, or of another layout than its size"),
        Fault(words[2] != out_features, f"qweight has {out_features} rows, its trailer says {{}}", words[2]),
        Fault(words[3] != in_features, f"qweight was packed for {{}} in_features, not {in_features}", words[3]),
    ]


def integrity_faults(qweight: Tensor, in_features: int) -> list[Fault]:
    """What only a reading of every byte finds: checksum, padding and the trailer's zeros."""
    payload, trailer = _split(qweight, in_features)
    checksum = _words(trailer[:_HEADER_BYTES])[4]
    return [
        Fault(checksum != _checksum(payload), "qweight does not match its checksum"),
        Fault(trailer[_HEADER_BYTES:].any(), "qweight has a damaged trailer"),
        Fault((_fields(qweight, in_features)[0][:, in_features:] != 1).any(), "qweight has damaged padding"),
    ]


def _layout(qweight: Tensor, in_features: int) -> str:
    layout = layout_of(qweight, in_features)
    assert layout is not None  # checks.packed has been called.
    return layout


def _places(layout: str, like: Tensor) -> Tensor:
    """What the fields of a byte, or its digits in base 3, are worth."""
    places = (1, 4, 16, 64) if layout == "2bit" else (1, 3, 9, 27, 81)
    return torch.tensor(places, device=like.device, dtype=torch.uint8)


def _version_and_layout(layout: str) -> int:
    return _VERSION | _LAYOUT_NUMBERS[layout] << 32


def _split(qweight: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Payload and trailer, flat."""
    out_features = qweight.shape[0]
    payload_bytes = out_features * payload_row_bytes(in_features, _layout(qweight, in_features))
    flat = qweight.reshape(-1)
    return flat[:payload_bytes], flat[payload_bytes:]


def _interleave(words: Tensor) -> Tensor:
    """Bytes (N, steps, 4) in row order to the payload's order: tiles of 16 rows, in them steps, in them rows."""
    tiles = len(words) // TILE_ROWS
    head = words[: tiles * TILE_ROWS].view(tiles, TILE_ROWS, words.shape[1], 4).transpose(1, 2)
    tail = words[tiles * TILE_ROWS :].transpose(0, 1)
    return torch.cat([head.reshape(-1), tail.reshape(-1)])


def _deinterleave(payload: Tensor, out_features: int) -> Tensor:
    """Inverse of _interleave."""
    tiles, last = divmod(out_features, TILE_ROWS)
    steps = len(payload) // out_features // 4
    head = payload[: tiles * TILE_ROWS * steps * 4].view(tiles, steps, TILE_ROWS, 4).transpose(1, 2)
    tail = payload[tiles * TILE_ROWS * steps * 4 :].view(steps, last, 4).transpose(0, 1)
    return torch.cat([head.reshape(tiles * TILE_ROWS, steps, 4), tail])


def _trailer(payload: Tensor, out_features: int, in_features: int, layout: str) -> Tensor:
    row_bytes = ceil_div(MIN_TRAILER_BYTES, out_features)
    header = [
        torch.full_like(payload[0], word, dtype=torch.int64)
        for word in (_MAGIC, _version_and_layout(layout), out_features, in_features)
    ]
    words = torch.stack([*header, _checksum(payload)])
    data = (words[:, None] >> torch.arange(0, 64, 8, device=payload.device)) & 0xFF
    return functional.pad(data.to(torch.uint8).view(-1), (0, out_features * row_bytes - _HEADER_BYTES))


def _words(data: Tensor) -> Tensor:
    """Little-endian 64-bit words of the trailer as int64."""
    return (data.view(-1, 8).to(torch.int64) << torch.arange(0, 64, 8, device=data.device)).sum(1)


def _checksum(payload: Tensor) -> Tensor:
    """Sum of w_i * P^i modulo 2^64 over the payload's little-endian 32-bit words; int64 wraps as needed."""
    words = (payload.view(-1, 4).to(torch.int64) << torch.arange(0, 32, 8, device=payload.device)).sum(1)
    powers = torch.ones_like(words[:1])
    base = _CHECKSUM_BASE
    while len(powers) < len(words):
        powers = torch.cat([powers, powers * base])
        base = _wrapped_square(base)
    return (words * powers[: len(words)]).sum()


def _wrapped_square(value: int) -> int:
    """value^2 modulo 2^64, as a signed 64-bit integer."""
    square = value * value % 2**64
    return square - 2**64 if square >= 2**63 else square
