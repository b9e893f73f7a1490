"""Attention over a cache in blocks of 256 positions, in plain NumPy: the contract's text, not the engine's code.

Nothing of BitLab is imported; sums in lanes, fma and exp are those of `layer_oracle`. Arrays are float32 unless said
otherwise; every operation on them is one rounding. A cache row is what the cache's form keeps of a key or value:
float32 values (of the float16 that was stored, too), or int8 codes with a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from layer_oracle import dot, exp, fma

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

BLOCK = 256
"""Positions of a block."""

LANES = 16
FORMS = ("float32", "float16", "int8")


def _fold(lanes: Floats) -> Floats:
    """Sums over the last axis, of 16 lanes: 16 to 8, 4, 2, 1."""
    with np.errstate(all="ignore"):
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def lane_sum(values: Floats) -> Floats:
    """Over the last axis: the same lanes and fold, with additions."""
    lanes = np.zeros((*values.shape[:-1], LANES), np.float32)
    with np.errstate(all="ignore"):
        for i in range(values.shape[-1]):
            lanes[..., i % LANES] = lanes[..., i % LANES] + values[..., i]
    return _fold(lanes)


@dataclass(frozen=True)
class Rows:
    """Keys or values of some positions of one head."""

    elements: Floats
    """(positions, head_dim): what is stored, widened; for int8 the codes."""

    scales: Floats | None
    """int8: (positions,)."""

    def __getitem__(self, positions: slice) -> Rows:
        return Rows(self.elements[positions], None if self.scales is None else self.scales[positions])


def store(form: str, rows: Floats) -> Rows:
    """(positions, head_dim) in the cache's form."""
    rows = np.asarray(rows, np.float32)
    with np.errstate(all="ignore"):
        if form == "float32":
            return Rows(rows, None)
        if form == "float16":
            return Rows(rows.astype(np.float16).astype(np.float32), None)
        if form != "int8":
            raise ValueError(f"form is {form!r}, expected one of {FORMS}")
        absmax = np.abs(rows).max(axis=-1)  # NaN where one is
        scales = np.maximum(absmax, np.float32(1e-5)) / np.float32(127)
        scales = np.where(np.isfinite(absmax), scales, np.float32(np.nan)).astype(np.float32)
        codes = np.clip(np.round(rows / scales[:, None]), -128, 127)
        return Rows(np.where(np.isnan(codes), np.float32(0), codes).astype(np.float32), scales)


@dataclass(frozen=True)
class State:
    """What a block, or several of them, gave a query."""

    largest: np.float32
    sum: np.float32
    output: Floats
    """(head_dim,), not yet divided by the sum."""


def score_scale(head_dim: int) -> np.float32:
    return np.float32(1 / np.sqrt(np.float64(head_dim)))


def attend_block(q: Floats, keys: Rows, values: Rows, scale: np.float32) -> State:
    """One query, (head_dim,), and the positions of one block that it sees."""
    with np.errstate(all="ignore"):
        scores = dot(q[None, :], keys.elements)
        if keys.scales is not None:
            scores = scores * keys.scales
        scores = scores * np.float32(scale)
        largest = np.float32(scores.max() + np.float32(0))  # NaN where one is; +0 for either zero
        weights = exp(scores - largest)
        total = lane_sum(weights)
        if values.scales is not None:
            weights = weights * values.scales
        output = np.zeros(q.shape, np.float32)
        for weight, value in zip(weights, values.elements, strict=True):
            output = fma(weight, value, output)
    return State(largest, np.float32(total), output)


def merge(before: State, now: State) -> State:
    """The result of the blocks before and that of one more."""
    with np.errstate(all="ignore"):
        largest = np.float32(np.maximum(before.largest, now.largest))
        a = exp(before.largest - largest)
        c = exp(now.largest - largest)
        return State(largest, np.float32(before.sum * a + now.sum * c), before.output * a + now.output * c)


def finish(state: State) -> Floats:
    with np.errstate(all="ignore"):
        return state.output / state.sum


def attend(q: Floats, keys: Rows, values: Rows, position: int, scale: np.float32) -> Floats:
    """The output of one query at `position`, which sees the keys and values of positions 0 to its own."""
    state: State | None = None
    for first in range(0, position + 1, BLOCK):
        seen = slice(first, min(first + BLOCK, position + 1))
        block = attend_block(q, keys[seen], values[seen], scale)
        state = block if state is None else merge(state, block)
    assert state is not None
    return finish(state)


def causal_attention(q: Floats, k: Floats, v: Floats, form: str = "float16") -> Floats:
    """A whole sequence from position 0 on.

    q is (tokens, heads, head_dim), k and v are (tokens, key_heads, head_dim), after the rotation; adjacent query heads
    share a key head. Returns (tokens, heads, head_dim).
    """
    tokens, heads, head_dim = q.shape
    shared = heads // k.shape[1]
    scale = score_scale(head_dim)
    out = np.empty(q.shape, np.float32)
    for head in range(heads):
        keys, values = store(form, k[:, head // shared]), store(form, v[:, head // shared])
        for position in range(tokens):
            out[position, head] = attend(q[position, head], keys, values, position, scale)
    return out
