#!/usr/bin/env python3
"""Writes docs/guides/test-vectors.json: inputs and the bits that every implementation of the contract returns.

The numbers come from oracle.py and layer_oracle.py in tests/python/helpers, the contract in plain NumPy; nothing of
BitLab takes part.
docs/guides/porting.md describes the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python" / "helpers"))

import layer_oracle  # noqa: E402
import oracle  # noqa: E402
from language_model_oracle import scaling_of  # noqa: E402
from oracle import Floats, Schema  # noqa: E402

FILE = ROOT / "docs" / "guides" / "test-vectors.json"


def hex_bits(values: Floats | np.float32) -> str:
    """The bits of float32 values, 8 hexadecimal digits each, in row-major order. Every NaN is 7fc00000."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    bits = np.where(np.isnan(flat), np.uint32(0x7FC00000), flat.view(np.uint32))
    return " ".join(f"{int(b):08x}" for b in bits)


def made(count: int, step: int) -> Floats:
    """Value i is ((i * step) mod 2003 - 1001) / 1024: exact in float32, and easy to make again."""
    return (((np.arange(count) * step) % 2003 - 1001) / 1024).astype(np.float32)


def scale_vector(count: int, step: int, factor: float) -> dict[str, Any]:
    """The one scale of `count` weights, the value i of which is factor * made."""
    values = made(count, step) * np.float32(factor)
    total = oracle.ordered_sum(np.abs(values).astype(np.float64))
    return {
        "count": count,
        "step": step,
        "factor": hex_bits(np.array([factor], np.float32)),
        "sum": float(total).hex(),
        "scale": hex_bits(oracle.absmean(values)),
    }


def order_vector(name: str, count: int, ones: list[int]) -> dict[str, Any]:
    """2^53, 2^29 and ones among zeros: one more than their first two decides whether the scale is rounded up.

    In the fixed order ones meet before they meet 2^53, and count; where one meets 2^53 alone, it is lost.
    """
    values = np.zeros(count, np.float32)
    values[[0, 2]] = 2.0**53, 2.0**29
    values[ones] = 1
    return {
        "name": name,
        "count": count,
        "values": [[int(i), hex_bits(values[i : i + 1])] for i in np.flatnonzero(values)],
        "sum": oracle.ordered_sum(values.astype(np.float64)).hex(),
        "scale": hex_bits(oracle.absmean(values)),
    }


def linear_vector(name: str, x: Floats, weight: Floats, bias: Floats | None, schema: Schema) -> dict[str, Any]:
    """All that int8 activations give, step by step."""
    s_w, s_x = oracle.weight_scale(weight, schema), oracle.x_scale(x, schema)
    q_w, q_x = oracle.quantize_weight(weight, s_w, schema), oracle.quantize_x(x, s_x, schema)
    return {
        "name": name,
        **schema.kwargs(),
        "rows": x.shape[0],
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "x": hex_bits(x),
        "weight": hex_bits(weight),
        "bias": None if bias is None else hex_bits(bias),
        "weight_scale": hex_bits(s_w),
        "weight_codes": q_w.tolist(),
        "packed": {layout: oracle.pack(q_w, layout).tobytes().hex() for layout in oracle.layouts_of(weight.shape[1])},
        "x_scale": hex_bits(s_x),
        "x_codes": q_x.tolist(),
        "y": {dtype: hex_bits(oracle.forward(x, weight, bias, schema, dtype)) for dtype in oracle.OUTPUT_DTYPES},
    }


def function_vector(name: str, function: Callable[[Floats], Floats], inputs: Sequence[float]) -> dict[str, Any]:
    """A function of one float32, element by element."""
    x = np.array(inputs, np.float64).astype(np.float32)
    return {"name": name, "x": hex_bits(x), "y": hex_bits(function(x))}


def function_vectors() -> list[dict[str, Any]]:
    """exp and what is made of it: ordinary values, and both sides of every branch."""
    below_half, below_one = 0.625 - 2.0**-24, 1 - 2.0**-24
    ends = [np.inf, -np.inf, np.nan]
    of_exp = [0.0, -0.0, 1, -1, 0.34657359, -0.34657359, 1e-6, -0.1, 2, -3.25, -5.75, -8.5, 10, -20.5, -50]
    bounds = [-87, -87 - 2.0**-17, 88, 88.72, 88.72 + 2.0**-17]
    others = [
        0.0,
        -0.0,
        1e-40,
        1e-10,
        0.1,
        -0.3,
        0.5,
        below_half,
        -0.625,
        below_one,
        1,
        -1.5,
        2,
        -3,
        3.9,
        -8,
        12.5,
        -88,
    ]
    functions = {
        "erf": layer_oracle.erf,
        "tanh": layer_oracle.tanh,
        "silu": layer_oracle.silu,
        "relu2": layer_oracle.relu2,
        "gelu": layer_oracle.gelu,
        "gelu_tanh": layer_oracle.gelu_tanh,
    }
    return [
        function_vector("exp", layer_oracle.exp, of_exp + bounds + ends),
        *(function_vector(name, function, others + ends) for name, function in functions.items()),
    ]


def rotation_vector(name: str, theta: float, limit: int, **parameters: Any) -> dict[str, Any]:
    """The tables of four pairs at some positions of a model of 4,096. `parameters` are those of config.json."""
    head_dim, positions, most = 8, [0, 1, 77, 4095], 4096
    scaling = scaling_of(parameters)
    cosines, sines = layer_oracle.rotary_tables(positions, head_dim, theta, scaling, limit, most)
    return {
        "name": name,
        "head_dim": head_dim,
        "max_position_embeddings": most,
        "context_limit": limit,
        "rope_parameters": {"rope_theta": theta, **parameters},
        "positions": positions,
        "cosines": hex_bits(cosines),
        "sines": hex_bits(sines),
    }


def rotation_vectors() -> list[dict[str, Any]]:
    """Every scaling; longrope with both of its lists."""
    original = {"original_max_position_embeddings": 1024}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original}
    yarn = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, **original}
    longrope = {"short_factor": [1.0, 1.05, 1.25, 1.5], "long_factor": [1.0, 1.75, 3.5, 7.25], **original}
    return [
        rotation_vector("default", 10000.0, 4096, rope_type="default"),
        rotation_vector("linear", 10000.0, 4096, rope_type="linear", factor=2.0),
        rotation_vector("llama3", 10000.0, 4096, rope_type="llama3", **llama3),
        rotation_vector("yarn", 1000000.0, 4096, rope_type="yarn", **yarn),
        rotation_vector("longrope, short", 10000.0, 1024, rope_type="longrope", **longrope),
        rotation_vector("longrope, long", 10000.0, 1025, rope_type="longrope", **longrope),
    ]


def vectors() -> dict[str, Any]:
    """The whole file."""
    per_tensor, per_channel = Schema(), Schema("per_channel", "int8", "per_channel")
    grouped, both = Schema("per_group", "int8", "per_channel", 32), Schema("per_group", "int8", "per_group", 64)
    ties = np.array([[127.0, 0.5, 1.5, -0.5, -2.5, 126.5]], np.float32)  # s_x is 1
    halves = np.array([[1.0, 0.5, -0.5, 0.25, 0.0, 0.75]], np.float32)  # s_w is 0.5: 0.25 is a tie
    broken = made(3 * 21, 577).reshape(3, 21)
    broken[1, 4] = np.nan
    tiny = np.full((2, 5), np.float32(1e-40))
    return {
        "scales": [
            scale_vector(20, 7, 1.0),
            scale_vector(4096, 11, 0.1),
            scale_vector(4097, 13, 0.1),
            scale_vector(70000, 17, 0.1),
        ],
        "orders": [
            order_vector("no ones", 16, []),
            order_vector("two ones in one lane", 32, [3, 19]),
            order_vector("a one alone is lost", 32, [16]),
            order_vector("there are 16 lanes", 32, [8, 24]),
            order_vector("lane l meets lane l + 8", 16, [1, 9]),
            order_vector("then l + 4", 16, [1, 5]),
            order_vector("a block has 4,096 elements", 8192, [4096, 4112]),
        ],
        "linears": [
            linear_vector("one element", made(1, 5).reshape(1, 1), made(1, 9).reshape(1, 1), None, per_tensor),
            linear_vector("ties go to even", ties, halves, None, per_tensor),
            linear_vector(
                "one scale", made(6, 401).reshape(2, 3), made(15, 733)[:12].reshape(4, 3), made(4, 99), per_tensor
            ),
            linear_vector(
                "a scale a row", made(42, 577).reshape(2, 21), made(357, 911).reshape(17, 21), made(17, 31), per_channel
            ),
            linear_vector("a NaN in a row", broken, made(42, 911).reshape(2, 21), made(2, 31), per_channel),
            linear_vector("a NaN, one scale", broken, made(42, 911).reshape(2, 21), None, per_tensor),
            linear_vector("floors of the scales", tiny, tiny, None, per_channel),
            linear_vector(
                "a scale a group", made(140, 577).reshape(2, 70), made(210, 911).reshape(3, 70), made(3, 31), grouped
            ),
            linear_vector(
                "a scale a group, of x too", made(140, 577).reshape(2, 70), made(210, 911).reshape(3, 70), None, both
            ),
            linear_vector("floors of the scales of groups", tiny, tiny, None, grouped),
        ],
        "functions": function_vectors(),
        "rotations": rotation_vectors(),
    }


def text() -> str:
    """JSON, a row of numbers on a line."""
    compact = re.sub(
        r"\[\s+((?:-?[\d.]+,\s+)*-?[\d.]+)\s+\]",
        lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]",
        json.dumps(vectors(), indent=1),
    )
    return compact + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="the file (%(default)s)")
    arguments = parser.parse_args()
    arguments.output.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
