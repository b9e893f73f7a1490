"""A second writer of GGUF and its ternary types, from the description of their bytes: the gguf package lacks some."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value: Any) -> bytes:
    """A metadata value with its type before it; lists hold one type."""
    if isinstance(value, list):
        return struct.pack("<I", 9) + value_bytes(value[0])[:4] + struct.pack("<Q", len(value)) + b"".join(
            value_bytes(each)[4:] for each in value
        )  # fmt: skip
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def gguf_bytes(
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    metadata: Mapping[str, Any] | None = None,
    alignment: int = 32,
) -> bytes:
    metadata = {"general.architecture": "qwen3", **(metadata or {})}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text(key) + value_bytes(value)
    body = b""
    for name, (shape, kind, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + body


def q2_0(codes: Any, scales: Any, size: int) -> bytes:
    """The scale first, then four codes in a byte, in order, lowest bits first."""
    out = b""
    for row, row_scales in zip(codes.astype(int) + 1, scales, strict=True):
        for block, scale in zip(row.reshape(-1, size), row_scales, strict=True):
            out += scale.tobytes() + bytes(int(a + 4 * b + 16 * c + 64 * d) for a, b, c, d in block.reshape(-1, 4))
    return out


def ptq1_0(codes: Any, scales: Any) -> bytes:
    """24 bytes of five trits, 2 of four, then the scale; the highest trit first, as ceil(256 v / 243)."""
    out = b""

    def coded(trits: list[int]) -> int:
        number = 0
        for trit in [*trits, 0][:5]:
            number = 3 * number + int(trit)
        return (number * 256 + 242) // 243

    for row, row_scales in zip(codes.astype(int) + 1, scales, strict=True):
        for block, scale in zip(row.reshape(-1, 128), row_scales, strict=True):
            runs = [coded([block[16 * n + m] for n in range(5)]) for m in range(16)]
            runs += [coded([block[80 + 8 * n + m] for n in range(5)]) for m in range(8)]
            last = [coded([block[120 + m + 2 * n] for n in range(4)]) for m in range(2)]
            out += bytes(runs + last) + scale.tobytes()
    return out


def i2_s(codes: Any, scale: float) -> bytes:
    """Runs of 128 values in 32 bytes, value p of them in the highest bits of byte p."""
    out = bytearray()
    for run in (codes.astype(int) + 1).reshape(-1, 4, 32):
        out += bytes(int(64 * a + 16 * b + 4 * c + d) for a, b, c, d in run.T)
    return bytes(out) + struct.pack("<f", scale) + bytes(28)


def tq2_0(codes: Any, scales: Any) -> bytes:
    """Two halves of 128, value m + 32 l of one in the bits 2 l of byte m; the scale last."""
    out = b""
    for row, row_scales in zip(codes.astype(int) + 1, scales, strict=True):
        for block, scale in zip(row.reshape(-1, 2, 4, 32), row_scales, strict=True):
            out += b"".join(bytes(int(a + 4 * b + 16 * c + 64 * d) for a, b, c, d in half.T) for half in block)
            out += scale.tobytes()
    return out
