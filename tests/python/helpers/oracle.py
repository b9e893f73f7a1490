"""The contract in plain NumPy: slow, obvious, and independent of the code that it judges.

Nothing of BitLab is imported here and no torch operation takes part in a number. Arrays are float32 unless said
otherwise; a bfloat16 or float16 value is held as the float32 of the same value. Shapes: x (M, K) or any leading
dimensions, weight (N, K), bias (N,), y (M, N).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
AnyFloats = npt.NDArray[Any]
"""float32, or float16: scales per group."""

Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]

FLOOR = np.float32(1e-5)
"""Smallest weight scale and smallest absmax of an activation."""

MAGIC = b"BITLABQW"
CHECKSUM_BASE = 0x9E3779B97F4A7C15
TILE_ROWS = 16
STEP = 16
"""Input features that one 32-bit word of the 2-bit layout holds."""

OUTPUT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Schema:
    """What the documented configuration says, in the document's own words."""

    weight_granularity: str = "per_tensor"
    activation_dtype: str = "int8"
    activation_granularity: str = "per_tensor"
    group_size: int = 128

    @property
    def weight_per_channel(self) -> bool:
        return self.weight_granularity == "per_channel"

    @property
    def weight_per_group(self) -> bool:
        return self.weight_granularity == "per_group"

    @property
    def x_per_channel(self) -> bool:
        return self.activation_granularity == "per_channel"

    @property
    def x_per_group(self) -> bool:
        return self.activation_granularity == "per_group"

    def slices(self, k: int) -> list[slice]:
        """The groups of k input features: the last one may be shorter; without groups one for all."""
        size = self.group_size if self.weight_per_group else k
        return [slice(begin, min(begin + size, k)) for begin in range(0, k, size)]

    @property
    def scale_dtype(self) -> str:
        """Of weight scales."""
        return "float16" if self.weight_per_group else "float32"

    @property
    def is_int8(self) -> bool:
        return self.activation_dtype == "int8"

    def kwargs(self) -> dict[str, Any]:
        """The keywords of the configuration class."""
        group_size = {"group_size": self.group_size} if self.weight_per_group else {}
        return {
            **group_size,
            "weight_granularity": self.weight_granularity,
            "activation_dtype": self.activation_dtype,
            "activation_granularity": self.activation_granularity,
        }

    def __str__(self) -> str:
        short = {"per_tensor": "tensor", "per_channel": "channel", "per_group": f"group{self.group_size}"}
        return f"w_{short[self.weight_granularity]}-{self.activation_dtype}-x_{short[self.activation_granularity]}"


GRANULARITIES = ("per_tensor", "per_channel")
SCHEMAS = [Schema(*parts) for parts in itertools.product(GRANULARITIES, ("int8", "float32"), GRANULARITIES)]
SCHEMAS += [
    Schema("per_group", "int8", "per_group", 32),
    Schema("per_group", "int8", "per_channel", 128),
    Schema("per_group", "int8", "per_tensor", 64),
    Schema("per_group", "int8", "per_group", 256),
    Schema("per_group", "float32", "per_channel", 32),
    Schema("per_group", "float32", "per_tensor", 128),
]
"""Without groups all that exist, with groups some of each kind and size."""
INT8_SCHEMAS = [schema for schema in SCHEMAS if schema.is_int8]
FLOAT32_SCHEMAS = [schema for schema in SCHEMAS if not schema.is_int8]


# --- number formats -------------------------------------------------------------------------------------------------


def bfloat16_bits_to_float32(bits: npt.NDArray[np.uint16]) -> Floats:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16_bits(values: Floats) -> npt.NDArray[np.uint16]:
    """To nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def round_to(values: Floats, dtype: str) -> Floats:
    """The float32 of the nearest value (ties to even) of `dtype`."""
    values = np.asarray(values, np.float32)
    if dtype == "bfloat16":
        return bfloat16_bits_to_float32(float32_to_bfloat16_bits(values))
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(np.float16).astype(np.float32)
    assert dtype == "float32", dtype
    return values


def half_ulp(values: Doubles, dtype: str) -> Doubles:
    """Largest distance of a number near `values` to its rounding to `dtype`."""
    bits, smallest = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}[dtype]
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, smallest)
    return np.ldexp(1.0, exponent - bits)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


# --- scales and codes -----------------------------------------------------------------------------------------------


def ordered_sum(values: Doubles) -> float:
    """Sum in the one fixed order: blocks of 4,096, 16 lanes, halved lanes; then the same over the block sums."""
    while True:
        count = ceil_div(len(values), 4096)
        blocks = np.zeros(count * 4096, np.float64)
        blocks[: len(values)] = values
        groups = blocks.reshape(count, 256, 16)
        lanes = np.zeros((count, 16), np.float64)
        for index in range(min(256, ceil_div(len(values), 16))):  # Later ones hold zeros.
            lanes = lanes + groups[:, index]
        for width in (8, 4, 2, 1):
            lanes = lanes[:, :width] + lanes[:, width : 2 * width]
        values = lanes[:, 0]
        if count == 1:
            return float(values[0])


def absmean(values: Floats) -> np.float32:
    """max(float32(S / n), 1e-5); NaN where a value is not finite."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        return np.float32(np.nan)
    total = ordered_sum(np.abs(flat).astype(np.float64))
    return np.maximum(np.float32(np.float64(total) / np.float64(flat.size)), FLOOR)


def group_scale(values: Floats) -> np.float16:
    """float16(max(float32(S / n), 2^-14)); NaN where a value is not finite or the mean above the largest float16."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        return np.float16(np.nan)
    mean = np.float32(np.float64(ordered_sum(np.abs(flat).astype(np.float64))) / np.float64(flat.size))
    return np.float16(np.nan) if mean > 65504 else np.float16(np.maximum(mean, np.float32(2.0**-14)))


def weight_scale(weight: Floats, schema: Schema) -> AnyFloats:
    """Shape () per tensor, (N,) per channel; float16 (N, groups) per group."""
    if schema.weight_per_group:
        groups = schema.slices(weight.shape[1])
        return np.array([[group_scale(row[group]) for group in groups] for row in weight], np.float16)
    if schema.weight_per_channel:
        return np.array([absmean(row) for row in weight], np.float32)
    return np.array(absmean(weight), np.float32)


def absmax_scale(values: Floats) -> np.float32:
    """max(absmax, 1e-5) / 127; NaN where a value is not finite."""
    if not np.isfinite(values).all():
        return np.float32(np.nan)
    absmax = np.float32(np.max(np.abs(values), initial=np.float32(0)))
    return np.float32(np.maximum(absmax, FLOOR) / np.float32(127))


def x_scale(x: Floats, schema: Schema) -> Floats:
    """Shape () per tensor, (*, 1) per channel, (*, groups) per group; ones where activations are not quantized."""
    if schema.x_per_group:
        rows = x.reshape(-1, x.shape[-1])
        groups = schema.slices(x.shape[-1])
        scales = np.array([[absmax_scale(row[group]) for group in groups] for row in rows], np.float32)
        return scales.reshape(*x.shape[:-1], len(groups))
    rows_shape = (*x.shape[:-1], 1) if schema.x_per_channel else ()
    if not schema.is_int8:
        return np.ones(rows_shape, np.float32)
    if not schema.x_per_channel:
        return np.array(absmax_scale(x), np.float32)
    rows = x.reshape(-1, x.shape[-1])
    return np.array([absmax_scale(row) for row in rows], np.float32).reshape(rows_shape)


def quotient_codes(values: Floats, scale: Floats, low: int, high: int) -> Codes:
    """clamp(round half to even(values / scale)); 0 where the quotient is NaN."""
    with np.errstate(all="ignore"):
        quotient = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
    assert quotient.dtype == np.float32
    codes = np.clip(np.rint(quotient), low, high)
    return np.where(np.isnan(codes), 0, codes).astype(np.int8)


def of_elements(scale: AnyFloats, schema: Schema, k: int) -> Floats:
    """Scales per group (*, groups) as float32 (*, k)."""
    wide = scale.astype(np.float32)
    parts = [np.repeat(wide[..., i : i + 1], g.stop - g.start, -1) for i, g in enumerate(schema.slices(k))]
    return np.concatenate(parts, -1)


def weight_divisor(scale: AnyFloats, schema: Schema, k: int) -> Floats:
    """The scale of every weight: to meet (N, k)."""
    if schema.weight_per_group:
        return of_elements(scale, schema, k)
    return scale.reshape(-1, 1) if schema.weight_per_channel else scale.reshape(())


def x_divisor(scale: Floats, schema: Schema, k: int) -> Floats:
    """The scale of every activation: to meet (*, k)."""
    if schema.x_per_group:
        return of_elements(scale, schema, k)
    return scale if schema.x_per_channel else scale.reshape(())


def quantize_weight(weight: Floats, scale: AnyFloats, schema: Schema) -> Codes:
    """-1, 0, 1 of shape (N, K)."""
    return quotient_codes(weight, weight_divisor(scale, schema, weight.shape[1]), -1, 1)


def quantize_x(x: Floats, scale: Floats, schema: Schema) -> Codes:
    """-128..127 of x's shape."""
    assert schema.is_int8
    return quotient_codes(x, x_divisor(scale, schema, x.shape[-1]), -128, 127)


def dequantize_weight(codes: Codes, scale: AnyFloats, schema: Schema) -> Floats:
    """codes * scale, one float32 product each."""
    return codes.astype(np.float32) * weight_divisor(scale, schema, codes.shape[1])


def dequantize_x(codes: Codes, scale: Floats, schema: Schema) -> Floats:
    """codes * scale, one float32 product each."""
    return codes.astype(np.float32) * x_divisor(scale, schema, codes.shape[-1])


# --- the linear -----------------------------------------------------------------------------------------------------


def integer_sums(qx: Codes, qw: Codes) -> Floats:
    """The exact sums as float32."""
    exact = qx.astype(np.int64) @ qw.astype(np.int64).T
    assert exact.size == 0 or np.abs(exact).max() < 2**31
    return exact.astype(np.int32).astype(np.float32)


def scaled(sums: Callable[[slice], Floats], s_x: Floats, s_w: AnyFloats, schema: Schema, k: int) -> Floats:
    """sum * (s_x * s_w) in float32, of groups the sum of these in order, from 0.

    s_x is (), (M, 1) or (M, groups), s_w (), (N,) or (N, groups).
    """
    if not schema.weight_per_group:
        return sums(slice(0, k)) * (s_x * s_w).astype(np.float32)
    total: Any = np.float32(0)
    for index, group in enumerate(schema.slices(k)):
        of_rows = s_x[:, index : index + 1] if schema.x_per_group else s_x
        total = total + sums(group) * (of_rows * s_w[:, index].astype(np.float32)).astype(np.float32)
    return np.asarray(total)


def forward_codes(x: Floats, qw: Codes, s_w: AnyFloats, bias: Floats | None, schema: Schema, dtype: str) -> Floats:
    """y of int8 activations from ternary codes and their scale, rounded once to `dtype`."""
    rows = x.reshape(-1, x.shape[-1])
    s_x = x_scale(rows, schema)
    qx = quantize_x(rows, s_x, schema)
    with np.errstate(all="ignore"):
        y = scaled(lambda group: integer_sums(qx[:, group], qw[:, group]), s_x, s_w, schema, x.shape[-1])
        y = y if bias is None else y + bias
    assert y.dtype == np.float32
    return round_to(y, dtype).reshape(*x.shape[:-1], qw.shape[0])


def forward(x: Floats, weight: Floats, bias: Floats | None, schema: Schema, dtype: str) -> Floats:
    """y of int8 activations, the bits that every kernel returns."""
    s_w = weight_scale(weight, schema)
    return forward_codes(x, quantize_weight(weight, s_w, schema), s_w, bias, schema, dtype)


def float32_sums(x: Floats, codes: Codes) -> Floats:
    """Of x (M, K) and codes (N, K): chains of 16 k in order from 0, the chains added in order."""
    sums = np.zeros((len(x), len(codes)), np.float32)
    weights = codes.astype(np.float32)
    with np.errstate(all="ignore"):
        for begin in range(0, x.shape[1], 16):
            chain = np.zeros_like(sums)
            for k in range(begin, min(begin + 16, x.shape[1])):
                chain = chain + np.outer(x[:, k], weights[:, k])
            sums = sums + chain
    assert sums.dtype == np.float32
    return sums


def float32_forward(x: Floats, weight: Floats, bias: Floats | None, schema: Schema, dtype: str) -> Floats:
    """y of float32 activations, the bits that every CPU kernel returns; a row that is not finite is NaN."""
    s_w = weight_scale(weight, schema)
    rows = x.reshape(-1, x.shape[-1])
    s_x: Floats = np.where(np.isfinite(rows).all(axis=1, keepdims=True), np.float32(1), np.float32(np.nan))
    codes = quantize_weight(weight, s_w, schema)
    with np.errstate(all="ignore"):
        y = scaled(lambda group: float32_sums(rows[:, group], codes[:, group]), s_x, s_w, schema, x.shape[-1])
        y = y if bias is None else y + bias
    assert y.dtype == np.float32
    return round_to(y, dtype).reshape(*x.shape[:-1], weight.shape[0])


def float32_forward_bounds(
    x: Floats, weight: Floats, bias: Floats | None, schema: Schema, dtype: str
) -> tuple[Doubles, Doubles]:
    """y of float32 activations and how far from it any order may be, both float64; NaN rows where x is not finite.

    A sum of K terms in any order errs by at most K * u * sum|terms| / (1 - K * u), u = 2^-24; two more operations
    (times the scale, plus the bias) add u each, one for each group where there are groups, the rounding to `dtype` half
    an ulp; every operation may lose 2^-150 where its result is subnormal.
    """
    s_w = weight_scale(weight, schema)
    codes = quantize_weight(weight, s_w, schema).astype(np.float64)
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if schema.weight_per_group:
        codes, s_w = codes * of_elements(s_w, schema, x.shape[-1]), np.array(1, np.float32)
    shift = 0.0 if bias is None else bias.astype(np.float64)
    u, k = 2.0**-24, x.shape[-1] + len(schema.slices(x.shape[-1])) - 1
    with np.errstate(all="ignore"):
        y = (rows @ codes.T) * s_w.astype(np.float64) + shift
        magnitude = (np.abs(rows) @ np.abs(codes).T) * s_w.astype(np.float64) + np.abs(shift)
        bound = (k + 2) * u / (1 - (k + 2) * u) * magnitude + (k + 2) * 2.0**-150 * (1 + s_w.astype(np.float64))
        y[~np.isfinite(rows).all(axis=1)] = np.nan
        bound = bound + half_ulp(np.abs(y) + bound, dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    return y.reshape(shape), bound.reshape(shape)


# --- the packed weight ----------------------------------------------------------------------------------------------


LAYOUTS = {"2bit": (1, 4, 4), "1.6bit": (2, 3, 5)}
"""Number in the trailer, base of a byte's digits, and how many of them."""


def packed_columns(n: int, k: int, layout: str = "2bit") -> tuple[int, int]:
    """(R, T): payload and trailer bytes for each output row."""
    return 4 * ceil_div(k, 4 * LAYOUTS[layout][2]), ceil_div(64, n)


def layouts_of(k: int) -> list[str]:
    """2bit always; 1.6bit where it is smaller."""
    return [name for name in LAYOUTS if name == "2bit" or packed_columns(1, k, name)[0] < packed_columns(1, k)[0]]


def checksum(payload: bytes) -> int:
    """Sum of w_i * P^i modulo 2^64 over the payload's little-endian 32-bit words."""
    total, power = 0, 1
    for start in range(0, len(payload), 4):
        total = (total + int.from_bytes(payload[start : start + 4], "little") * power) % 2**64
        power = power * CHECKSUM_BASE % 2**64
    return total


def pack_payload(codes: Codes, layout: str = "2bit") -> bytes:
    """Tiles of 16 rows; a step of 16 (20) k is one 32-bit word a row; digit f of byte j holds k = step + 4 f + j."""
    n, k = codes.shape
    _, base, digits = LAYOUTS[layout]
    width = 4 * digits
    steps = ceil_div(k, width)
    fields = [[int(code) + 1 for code in row] + [1] * (steps * width - k) for row in codes]
    payload = bytearray()
    for first in range(0, n, TILE_ROWS):
        for step in range(steps):
            for row in fields[first : first + TILE_ROWS]:
                for j in range(4):
                    payload.append(sum(row[width * step + 4 * f + j] * base**f for f in range(digits)))
    return bytes(payload)


def trailer(n: int, k: int, payload: bytes, layout: str = "2bit") -> bytes:
    """Magic, version, layout, sizes, checksum; zeros up to N * T bytes."""
    fields = (
        MAGIC
        + (1).to_bytes(4, "little")
        + LAYOUTS[layout][0].to_bytes(4, "little")
        + n.to_bytes(8, "little")
        + k.to_bytes(8, "little")
        + checksum(payload).to_bytes(8, "little")
    )
    return fields.ljust(n * packed_columns(n, k, layout)[1], b"\0")


def pack(codes: Codes, layout: str = "2bit") -> Bytes:
    """uint8 (N, R + T)."""
    n, k = codes.shape
    payload = pack_payload(codes, layout)
    flat = np.frombuffer(payload + trailer(n, k, payload, layout), np.uint8)
    return flat.reshape(n, sum(packed_columns(n, k, layout))).copy()


def unpack_fields(packed: Bytes, k: int) -> npt.NDArray[np.uint8]:
    """The stored 2-bit fields, 0..3, padding included: (N, 16 * ceil(K / 16)). The trailer is not looked at."""
    n, (payload_columns, _) = packed.shape[0], packed_columns(packed.shape[0], k)
    flat = packed.reshape(-1)
    steps = ceil_div(k, STEP)
    fields = np.zeros((n, steps * STEP), np.uint8)
    for first in range(0, n, TILE_ROWS):
        rows = min(TILE_ROWS, n - first)
        for step in range(steps):
            for lane in range(rows):
                word = first * payload_columns + (step * rows + lane) * 4
                for j in range(4):
                    for f in range(4):
                        fields[first + lane, STEP * step + 4 * f + j] = (int(flat[word + j]) >> (2 * f)) & 3
    return fields


def unpack(packed: Bytes, k: int) -> Codes:
    """The codes -1, 0, 1 of shape (N, K)."""
    return unpack_fields(packed, k)[:, :k].astype(np.int8) - np.int8(1)


# --- the straight-through gradients ---------------------------------------------------------------------------------


def gradients(dy: Floats, x: Floats, weight: Floats, schema: Schema) -> tuple[Doubles, Doubles, Doubles]:
    """dX = dY @ dq(W), dW = dY^T @ dq(x), db = sum(dY), in float64, for two-dimensional x."""
    s_w = weight_scale(weight, schema)
    dq_weight = dequantize_weight(quantize_weight(weight, s_w, schema), s_w, schema).astype(np.float64)
    dq_x = x.astype(np.float64)
    if schema.is_int8:
        s_x = x_scale(x, schema)
        dq_x = dequantize_x(quantize_x(x, s_x, schema), s_x, schema).astype(np.float64)
    dy64 = dy.astype(np.float64)
    return dy64 @ dq_weight, dy64.T @ dq_x, dy64.sum(axis=0)
