"""A language model in plain NumPy: the contract's operations one after the other, straight from a directory's files.

Nothing of BitLab is imported. `layer_oracle` and `oracle` have the operations; attention goes through the functions of
`attention_oracle`, for all queries at once. Arrays are float32 unless said otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import attention_oracle
import layer_oracle
import oracle
from checkpoints import read_tensors, unpack
from layer_oracle import RotaryScaling, f32
from oracle import Codes, Floats, Schema

Array = npt.NDArray[Any]

ACTIVATIONS = {"silu": "silu", "relu2": "relu2", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""hidden_act of config.json, and layer_oracle's name."""

ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
"""rope_parameters of config.json, and the fields of RotaryScaling."""


def scaling_of(parameters: Mapping[str, Any]) -> RotaryScaling:
    """From rope_parameters."""
    own = {key: value for key, value in parameters.items() if value is not None and key != "rope_theta"}
    kind = own.pop("rope_type", "default")
    return RotaryScaling("none" if kind == "default" else kind, **{ROPE_FIELDS[key]: own[key] for key in own})


def logits(directory: Path, tokens: Sequence[int], cache: str, context_limit: int = 0) -> Floats:
    """(tokens, vocab_size) of a model in BitLab's form, from an empty cache.

    Args:
        cache: "float16", "float32" or "int8".
        context_limit: The session's; 0: max_position_embeddings.
    """
    return Model(directory).logits(tokens, cache, context_limit)


class Model:
    """config.json and model.safetensors."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.tensors = read_tensors(directory / "model.safetensors")
        self.quantization: dict[str, Any] = self.config["quantization_config"]
        config = self.config
        self.heads: int = config["num_attention_heads"]
        self.key_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        multipliers = config if config["model_type"] == "granite" else {}
        self.embedding_multiplier = f32(multipliers.get("embedding_multiplier", 1))
        self.residual_multiplier = f32(multipliers.get("residual_multiplier", 1))
        self.logits_multiplier = f32(1 / multipliers.get("logits_scaling", 1))
        root = 1 / math.sqrt(self.head_dim)
        self.attention_scale = f32(multipliers.get("attention_multiplier", 1) if multipliers else root)

    # --- what the files say -------------------------------------------------------------------------------------------

    def kind_of(self, name: str) -> str:
        """Of a matrix: "ternary", "int8" or "float". The embedding and the head are floats unless listed."""
        modules = self.quantization.get("modules", {})
        otherwise = "ternary" if name.startswith("model.layers.") else "float"
        return str(modules[name]["kind"]) if name in modules else otherwise

    def schema_of(self, name: str) -> Schema:
        """Of a ternary matrix: its own fields, the rest from all."""
        fields = {**self.quantization, **self.quantization.get("modules", {}).get(name, {})}
        names = "weight_granularity", "activation_dtype", "activation_granularity", "group_size"
        schema = Schema(*(fields[each] for each in names))
        assert schema.is_int8
        assert schema.activation_granularity != "per_tensor"
        return schema

    def floats(self, name: str) -> Floats | None:
        """A tensor widened, if there is one."""
        values = self.tensors.get(name)
        return None if values is None else values.astype(np.float32)

    def codes(self, name: str, columns: int) -> tuple[Codes, Array]:
        """Ternary codes (N, columns) and their scale."""
        return unpack(self.tensors[f"{name}.qweight"], columns), self.tensors[f"{name}.qweight_scale"]

    def rotations(self, count: int, context_limit: int) -> tuple[Floats, Floats]:
        """Cosines and sines of positions from 0, each (count, head_dim / 2)."""
        parameters, most = self.config["rope_parameters"], self.config["max_position_embeddings"]
        theta, scaling = float(parameters["rope_theta"]), scaling_of(parameters)
        return layer_oracle.rotary_tables(range(count), self.head_dim, theta, scaling, context_limit or most, most)

    # --- its operations -----------------------------------------------------------------------------------------------

    def table(self, name: str) -> Floats:
        """All rows of an embedding, (vocab_size, hidden_size): widened, times their scales."""
        if self.kind_of(name) == "ternary":
            codes, scale = self.codes(name, self.config["hidden_size"])
            return oracle.dequantize_weight(codes, scale, self.schema_of(name))
        rows = self.tensors[f"{name}.weight"].astype(np.float32)
        scale_of_rows = self.floats(f"{name}.weight_scale")
        return rows if scale_of_rows is None else rows * scale_of_rows[:, None]

    def linear(self, name: str, x: Floats, weights: str | None = None) -> Floats:
        """x (M, K) to (M, N). `weights` names the matrix where another's are shared."""
        weights, bias = weights or name, self.floats(f"{name}.bias")
        if self.kind_of(name) == "ternary":
            codes, scale = self.codes(weights, x.shape[1])
            return oracle.forward_codes(x, codes, scale, bias, self.schema_of(name), "float32")
        scale_of_rows = self.floats(f"{weights}.weight_scale")
        product = layer_oracle.dense(x, self.tensors[f"{weights}.weight"], scale_of_rows)
        return product if bias is None else add(product, bias)

    def norm(self, name: str, x: Floats) -> Floats:
        """x (*, K); x itself where the model has no such norm."""
        weight = self.floats(f"{name}.weight")
        return x if weight is None else layer_oracle.rms_norm(x, weight, self.config["rms_norm_eps"])

    def attention(self, name: str, x: Floats, rotations: tuple[Floats, Floats], cache: str) -> Floats:
        """x and the result (M, hidden_size)."""
        cosines, sines = (table[:, None, :] for table in rotations)
        split = {"q": self.heads, "k": self.key_heads, "v": self.key_heads}
        rows = {each: self.linear(f"{name}.{each}_proj", x).reshape(len(x), heads, -1) for each, heads in split.items()}
        q, k = (layer_oracle.rotate(self.norm(f"{name}.{each}_norm", rows[each]), cosines, sines) for each in "qk")
        out = causal_attention(q, k, rows["v"], cache, self.attention_scale)
        return self.linear(f"{name}.o_proj", self.norm(f"{name}.attn_sub_norm", out.reshape(len(x), -1)))

    def feed_forward(self, name: str, x: Floats) -> Floats:
        """x and the result (M, hidden_size)."""
        gate, up = (self.linear(f"{name}.{each}_proj", x) for each in ("gate", "up"))
        inner = layer_oracle.activate(ACTIVATIONS[self.config.get("hidden_act", "silu")], gate, up)
        return self.linear(f"{name}.down_proj", self.norm(f"{name}.ffn_sub_norm", inner))

    def logits(self, tokens: Sequence[int], cache: str, context_limit: int = 0) -> Floats:
        rotations = self.rotations(len(tokens), context_limit)
        hidden = times(self.table("model.embed_tokens")[list(tokens)], self.embedding_multiplier)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = self.norm(f"{name}.input_layernorm", hidden)
            update = self.attention(f"{name}.self_attn", x, rotations, cache)
            hidden = add(hidden, times(update, self.residual_multiplier))
            x = self.norm(f"{name}.post_attention_layernorm", hidden)
            update = self.feed_forward(f"{name}.mlp", x)
            hidden = add(hidden, times(update, self.residual_multiplier))
        x = self.norm("model.norm", hidden)
        weights = "model.embed_tokens" if self.config.get("tie_word_embeddings") else None
        return times(self.linear("lm_head", x, weights), self.logits_multiplier)


def add(a: Floats, b: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.asarray(a + b, np.float32)


def times(a: Floats, b: np.float32 | Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.asarray(a * b, np.float32)


# --- attention of many queries ----------------------------------------------------------------------------------------


def causal_attention(q: Floats, k: Floats, v: Floats, form: str, scale: np.float32) -> Floats:
    """What attention_oracle.causal_attention gives, with all queries that see a block taken together.

    q is (tokens, heads, head_dim), k and v are (tokens, key_heads, head_dim), after the rotation; adjacent query heads
    share a key head. Returns (tokens, heads, head_dim).
    """
    tokens, heads, head_dim = q.shape
    shared, out = heads // k.shape[1], np.empty(q.shape, np.float32)
    for key_head in range(k.shape[1]):
        keys, values = (attention_oracle.store(form, rows[:, key_head]) for rows in (k, v))
        own = slice(key_head * shared, (key_head + 1) * shared)
        largest, total = (np.empty((tokens, shared), np.float32) for _ in range(2))
        output = np.empty((tokens, shared, head_dim), np.float32)
        for first in range(0, tokens, attention_oracle.BLOCK):  # Queries before `first` do not see the block.
            block = slice(first, min(first + attention_oracle.BLOCK, tokens))
            found = attend_block(q[first:, own], keys[block], values[block], scale)
            state = largest[first:], total[first:], output[first:]
            for old, new in zip(state, found if first == 0 else merged(state, found), strict=True):
                old[:] = new
        with np.errstate(all="ignore"):
            out[:, own] = output / total[..., None]
    return out


Partial = tuple[Floats, Floats, Floats]
"""Of (tokens, heads) queries: the largest score, the sum of weights, and the weighted sum (tokens, heads, head_dim)."""


def attend_block(q: Floats, keys: attention_oracle.Rows, values: attention_oracle.Rows, scale: np.float32) -> Partial:
    """q (tokens, heads, head_dim); the first of them is at the block's first position."""
    positions = len(keys.elements)
    seen = np.arange(positions) <= np.arange(len(q))[:, None, None]  # (tokens, 1, positions)
    with np.errstate(all="ignore"):
        scores = layer_oracle.dot(q[:, :, None, :], keys.elements)
        scores = scores if keys.scales is None else scores * keys.scales
        scores = np.where(seen, scores * scale, f32(-np.inf))
        largest = scores.max(axis=-1) + f32(0)  # NaN where one is; +0 for either zero
        weights = np.where(seen, layer_oracle.exp(scores - largest[..., None]), f32(0))
        total = attention_oracle.lane_sum(weights)  # + 0 changes no lane: none is -0
        weights = weights if values.scales is None else weights * values.scales
    output: Floats = np.zeros(q.shape, np.float32)
    for j in range(positions):  # Queries before j do not see it.
        output[j:] = layer_oracle.fma(weights[j:, :, j, None], values.elements[j], output[j:])
    return largest, total, output


def merged(before: Partial, now: Partial) -> Partial:
    """The result of the blocks before and that of one more."""
    with np.errstate(all="ignore"):
        largest = np.maximum(before[0], now[0])
        a, c = layer_oracle.exp(before[0] - largest), layer_oracle.exp(now[0] - largest)
        output = before[2] * a[..., None] + now[2] * c[..., None]
        return largest, before[1] * a + now[1] * c, output
