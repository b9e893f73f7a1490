"""The operations of a language model in plain NumPy: the same sequences of roundings, written a second time.

Nothing of BitLab is imported here, and no libm function takes part in a number (NumPy's sqrt is correctly rounded).
Arrays are float32 unless said otherwise; `Doubles` are float64. Functions of one argument take any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from oracle import Bytes, Codes, Doubles, Floats

LANES = 16
TWO_PI = 2 * math.pi


def quiet(function: Any) -> Any:
    """Without warnings: infinities, NaN and zeros are ordinary inputs here."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


def f32(value: float | str) -> np.float32:
    """A float32 from a number, or from hexadecimal digits, which must be exact."""
    if isinstance(value, str):
        exact = float.fromhex(value)
        assert float(np.float32(exact)) == exact, value
        return np.float32(exact)
    return np.float32(value)


# --- fused multiply-add ---------------------------------------------------------------------------------------------


@quiet
def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Floats:
    """a * b + c of float32, rounded once.

    The product of two float32 is exact in float64. The sum is not: it is rounded to odd there, that is towards zero,
    with the last bit set where something was cut off. Such a number lies on the same side of every float32 tie.
    """
    wide = [np.asarray(value, np.float32).astype(np.float64) for value in (a, b, c)]
    product, addend = np.broadcast_arrays(wide[0] * wide[1], wide[2])
    nearest = product + addend
    larger = np.where(np.abs(product) >= np.abs(addend), product, addend)
    smaller = np.where(np.abs(product) >= np.abs(addend), addend, product)
    error = smaller - (nearest - larger)  # exact: the larger one comes first
    finite = np.isfinite(nearest) & np.isfinite(error)
    inexact = finite & (error != 0)
    beyond = inexact & (np.sign(error) != np.sign(nearest))  # the exact sum is nearer to zero
    truncated = np.where(beyond, np.nextafter(nearest, 0.0), nearest)
    bits = np.ascontiguousarray(truncated).view(np.int64).reshape(nearest.shape)
    odd = np.where(inexact, (bits | 1).view(np.float64), nearest)
    return np.asarray(odd, np.float64).astype(np.float32)


def horner(x: Floats, coefficients: Sequence[str]) -> Floats:
    """The polynomial, highest power first, by fused multiply-adds."""
    total: Floats = np.full_like(x, f32(coefficients[0]))
    for coefficient in coefficients[1:]:
        total = fma(total, x, f32(coefficient))
    return total


# --- exp, erf, tanh -------------------------------------------------------------------------------------------------


@quiet
def exp(x: npt.ArrayLike) -> Floats:
    """0 below -87, infinity above 88.72."""
    x = np.asarray(x, np.float32)
    inside = np.where((x >= f32(-87)) & (x <= f32(88.72)), x, f32(0))
    shift = f32("0x1.8p+23")
    n = fma(inside, f32("0x1.715476p+0"), shift) - shift
    r = fma(n, f32("-0x1.62e43p-1"), inside)
    r = fma(n, f32("0x1.05c61p-29"), r)
    series = ("0x1.6a4ecep-10", "0x1.12399cp-7", "0x1.5558bp-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p+0", "0x1p+0")
    result = np.ldexp(horner(r, series), n.astype(np.int32)).astype(np.float32)  # exact: the results are normal
    result = np.where(x < f32(-87), f32(0), np.where(x > f32(88.72), f32(np.inf), result))
    return np.where(np.isnan(x), f32(np.nan), result)


@quiet
def erf(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    t = np.abs(x)
    small_series = (
        "0x1.496a84p-14",
        "-0x1.a3f720p-11",
        "0x1.5405b6p-8",
        "-0x1.b7f90ep-6",
        "0x1.ce2cf8p-4",
        "-0x1.81273ep-2",
        "0x1.06eba8p-3",
    )
    small = fma(horner(t * t, small_series), t, t)
    bounded = np.where(t > 4, f32(4), t)
    large_series = (
        "0x1.d4855ap-17",
        "-0x1.6fa0d8p-12",
        "0x1.ec80c4p-9",
        "-0x1.8961bap-6",
        "0x1.b459c4p-4",
        "0x1.451ab8p-1",
        "0x1.20f21cp+0",
    )
    large = f32(1) - exp(horner(bounded, large_series) * -bounded)
    return np.copysign(np.where(t < 1, small, large), x).astype(np.float32)


@quiet
def tanh(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    t = np.abs(x)
    square = t * t
    series = ("0x1.18e2p-9", "-0x1.0bf508p-7", "0x1.638b5ap-6", "-0x1.b9ee9p-5", "0x1.111066p-3", "-0x1.555554p-2")
    small = fma(horner(square, series) * square, t, t)
    bounded = np.where(t > 10, f32(10), t)
    large = f32(1) - f32(2) / (exp(bounded + bounded) + f32(1))
    return np.copysign(np.where(t < f32(0.625), small, large), x).astype(np.float32)


# --- activations ----------------------------------------------------------------------------------------------------


@quiet
def silu(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    return x / (f32(1) + exp(-x))


@quiet
def relu2(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    positive = np.where(x < 0, f32(0), x)
    return positive * positive


@quiet
def gelu(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    return (f32(0.5) * x) * (f32(1) + erf(x * f32("0x1.6a09e6p-1")))


@quiet
def gelu_tanh(x: npt.ArrayLike) -> Floats:
    x = np.asarray(x, np.float32)
    cube = (x * x) * x
    return (f32(0.5) * x) * (f32(1) + tanh(f32("0x1.988454p-1") * (x + f32(0.044715) * cube)))


ACTIVATIONS = {"silu": silu, "relu2": relu2, "gelu": gelu, "gelu_tanh": gelu_tanh}


def activate(activation: str, gate: Floats, up: Floats) -> Floats:
    """activation(gate) * up"""
    with np.errstate(all="ignore"):
        return np.asarray(ACTIVATIONS[activation](gate) * up, np.float32)


# --- sums in lanes --------------------------------------------------------------------------------------------------


@quiet
def dot(a: Floats, b: Floats) -> Floats:
    """The sum over the last axis, which a and b share; the others broadcast."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float32), np.asarray(b, np.float32))
    lanes: Floats = np.zeros((*a.shape[:-1], LANES), np.float32)
    for first in range(0, a.shape[-1], LANES):
        count = min(LANES, a.shape[-1] - first)
        part = slice(first, first + count)
        lanes[..., :count] = fma(a[..., part], b[..., part], lanes[..., :count])
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return np.asarray(lanes[..., 0], np.float32)


def dense(x: Floats, weight: Floats | Codes, scale: Floats | None = None) -> Floats:
    """x (M, K), weight (N, K) widened or int8 codes, scale (N,) of int8: (M, N)."""
    product = dot(x[:, None, :], weight.astype(np.float32)[None, :, :])
    with np.errstate(all="ignore"):
        return product if scale is None else np.asarray(product * scale, np.float32)


def quantize_dense(weight: Floats) -> tuple[Codes, Floats]:
    """int8 codes and a scale for each row: absmax / 127, 1 for a row of zeros."""
    absmax = np.max(np.abs(weight), axis=1)
    scale = np.where(absmax == 0, f32(1), absmax / f32(127)).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


@quiet
def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x (*, K), weight (K,)."""
    mean_square = dot(x, x) / f32(x.shape[-1])
    reciprocal = f32(1) / np.sqrt(mean_square + f32(eps))
    return np.asarray((x * reciprocal[..., None]) * weight, np.float32)


@quiet
def rotate(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    """x (*, head_dim), cosines and sines (*, head_dim / 2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1).astype(np.float32)


# --- float64 --------------------------------------------------------------------------------------------------------


def polynomial64(x: float, coefficients: Sequence[float]) -> float:
    """The polynomial, constant first: a product and a sum for each power."""
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


LN2_HIGH = float.fromhex("0x1.62e42fefa2p-1")
LN2_LOW = float.fromhex("0x1.9ef35793c7673p-41")


def log64(x: float) -> float:
    """Of a positive normal number."""
    m, exponent = math.frexp(x)  # m in [0.5, 1), and both exact
    if m < float.fromhex("0x1.6a09e667f3bcdp-1"):
        m, exponent = 2 * m, exponent - 1
    f = m - 1.0
    s = f / (m + 1.0)
    square = s * s
    series = polynomial64(square, [2.0 / k for k in range(3, 22, 2)])
    rest = s * (square * series - f) + exponent * LN2_LOW
    return exponent * LN2_HIGH + (f + rest)


def exp64(x: float) -> float:
    n = float(round(x * float.fromhex("0x1.71547652b82fep+0")))  # ties to even
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = 1.0 + (r + (r * r) * polynomial64(r, [1.0 / math.factorial(k) for k in range(2, 14)]))
    return math.ldexp(p, int(n))


def quarter_turns(x: float) -> tuple[int, float]:
    """The nearest multiple of pi / 2, and what x has beyond it."""
    n = float(round(x * float.fromhex("0x1.45f306dc9c883p-1")))
    a = x - n * float.fromhex("0x1.921fb54p+0")
    b = n * float.fromhex("0x1.10b461p-30")
    difference = a - b
    back = difference - a
    error = (a - (difference - back)) - (b + back)
    return int(n), difference + (error - n * float.fromhex("0x1.a62633145c06ep-58"))


def sine_at(quarters: int, rest: float) -> float:
    square = rest * rest
    if quarters % 2 == 1:
        cosine = [(-1.0) ** (k // 2) / math.factorial(k) for k in range(2, 17, 2)]
        value = 1.0 + square * polynomial64(square, cosine)
    else:
        sine = [(-1.0) ** (k // 2) / math.factorial(k) for k in range(3, 18, 2)]
        value = rest + rest * (square * polynomial64(square, sine))
    return -value if quarters % 4 >= 2 else value


def sin64(x: float) -> float:
    quarters, rest = quarter_turns(x)
    return sine_at(quarters, rest)


def cos64(x: float) -> float:
    quarters, rest = quarter_turns(x)
    return sine_at(quarters + 1, rest)


# --- rotary tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RotaryScaling:
    """Hugging Face's rope_parameters; None and 0: absent."""

    kind: str = "none"
    factor: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    attention_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factors: list[float] = field(default_factory=list)
    long_factors: list[float] = field(default_factory=list)


def effective_factor(scaling: RotaryScaling, max_positions: int) -> float:
    if scaling.factor or not scaling.original_context:
        return scaling.factor
    return max_positions / scaling.original_context


def yarn_bounds(head_dim: int, theta: float, s: RotaryScaling) -> tuple[float, float]:
    """Pairs up to the first keep their frequencies, from the second on they are divided."""

    def pair_of(rotations: float) -> float:
        return head_dim * log64(s.original_context / (rotations * TWO_PI)) / (2.0 * log64(theta))

    low, high = pair_of(s.beta_fast), pair_of(s.beta_slow)
    if s.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(head_dim - 1))
    return low, high + 0.001 if low == high else high


def frequencies(
    head_dim: int, theta: float, s: RotaryScaling, context_limit: int = 0, max_positions: int = 0
) -> list[float]:
    """Radians per position of each pair."""
    powers = [exp64(2 * i / head_dim * log64(theta)) for i in range(head_dim // 2)]
    factor = effective_factor(s, max_positions)
    if s.kind == "linear":
        return [1.0 / power / factor for power in powers]
    if s.kind == "llama3":
        return [llama3_frequency(1.0 / power, s) for power in powers]
    if s.kind == "yarn":
        low, high = yarn_bounds(head_dim, theta, s)
        kept = [1.0 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(powers))]
        return [1.0 / (factor * p) * (1.0 - k) + 1.0 / p * k for p, k in zip(powers, kept, strict=True)]
    if s.kind == "longrope":
        factors = s.long_factors if context_limit > s.original_context else s.short_factors
        return [1.0 / (f * power) for f, power in zip(factors, powers, strict=True)]
    assert s.kind == "none", s.kind
    return [1.0 / power for power in powers]


def llama3_frequency(frequency: float, s: RotaryScaling) -> float:
    wavelength = TWO_PI / frequency
    if wavelength > s.original_context / s.low_freq_factor:
        return frequency / s.factor
    if wavelength < s.original_context / s.high_freq_factor:
        return frequency
    smooth = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1.0 - smooth) * frequency / s.factor + smooth * frequency


def attention_factor(s: RotaryScaling, max_positions: int = 0) -> float:
    """What cosines and sines are multiplied by."""
    if s.kind not in ("yarn", "longrope"):
        return 1.0
    if s.attention_factor:
        return s.attention_factor
    factor = effective_factor(s, max_positions)
    if factor <= 1:
        return 1.0
    if s.kind == "longrope":
        return math.sqrt(1.0 + log64(factor) / log64(s.original_context))
    if s.mscale and s.mscale_all_dim:
        return (0.1 * s.mscale * log64(factor) + 1.0) / (0.1 * s.mscale_all_dim * log64(factor) + 1.0)
    return 0.1 * 1.0 * log64(factor) + 1.0


def rotary_tables(
    positions: Sequence[int], head_dim: int, theta: float, s: RotaryScaling, context_limit: int, max_positions: int
) -> tuple[Floats, Floats]:
    """Cosines and sines, each (positions, head_dim / 2): products in float64, rounded once."""
    factor = attention_factor(s, max_positions)
    rates = frequencies(head_dim, theta, s, context_limit, max_positions)
    angles = [[float(position) * rate for rate in rates] for position in positions]
    cosines: Doubles = np.array([[cos64(angle) * factor for angle in row] for row in angles], np.float64)
    sines: Doubles = np.array([[sin64(angle) * factor for angle in row] for row in angles], np.float64)
    return cosines.astype(np.float32), sines.astype(np.float32)


# --- ternary embedding ----------------------------------------------------------------------------------------------


def ternary_row(packed: Bytes, in_features: int, row: int, scale: npt.NDArray[Any], group_size: int = 0) -> Floats:
    """A row of a packed weight (N, R + T): code times scale.

    `scale` has one element, one for each row, or with `group_size` float16 (N, groups).
    """
    rows = packed.shape[0]
    flat = packed.reshape(-1)
    layout = int(flat[packed.size - rows * -(-64 // rows) + 12])
    base, digits = (4, 4) if layout == 1 else (3, 5)
    steps = -(-in_features // (4 * digits))
    tile_rows = min(16, rows - row // 16 * 16)
    first = row // 16 * 16 * 4 * steps + row % 16 * 4
    codes: Floats = np.zeros(steps * 4 * digits, np.float32)
    for step in range(steps):
        for j in range(4):
            byte = int(flat[first + step * tile_rows * 4 + j])
            for f in range(digits):
                code = byte // base**f % base
                if code > 2 or (layout == 2 and byte > 242):
                    raise ValueError(f"invalid code in byte {byte} of row {row}")
                codes[4 * digits * step + 4 * f + j] = code - 1
    if group_size:
        factors = np.repeat(scale[row].astype(np.float32), group_size)[:in_features]
    else:
        factors = np.full(in_features, scale.reshape(-1)[row if scale.size > 1 else 0], np.float32)
    return codes[:in_features] * factors
