"""Tiny ternary language models in other people's containers: what is in them, and writers of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

import oracle
from gguf_bytes import gguf_bytes, i2_s, q2_0, tq2_0

Array = npt.NDArray[Any]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "bitnet": {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2"},
    "1bitllm": {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    "minicpm": {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 64,
    },
}


@dataclass
class TinyModel:
    """Codes, scales and floats by transformers' names. `scales` is (N, groups of `group` weights)."""

    config: dict[str, Any]
    group: int
    codes: dict[str, Array] = field(default_factory=dict)
    scales: dict[str, Array] = field(default_factory=dict)
    floats: dict[str, Array] = field(default_factory=dict)

    def weight(self, name: str) -> Array:
        """float32: codes times their scales."""
        codes = self.codes[name]
        group = min(self.group, codes.shape[1])
        return codes * self.scales[name].astype(np.float32).repeat(group, axis=1)[:, : codes.shape[1]]


def tiny(
    kind: str = "llama",
    group: int = 128,
    scales: str = "group",
    ternary_embedding: bool = False,
    tied: bool = False,
    seed: int = 0,
    hidden: int = 128,
    inner: int = 256,
    **config: Any,
) -> TinyModel:
    """A model with two layers.

    Args:
        scales: "group": float16, one for each group; "tensor": one of a bfloat16's bits for each tensor.
    """
    rng = np.random.default_rng(seed)
    sizes = {"vocab_size": 96, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    fields = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32", "tie_word_embeddings": tied}
    model = TinyModel(
        {**sizes, **fields, "hidden_act": "silu", "head_dim": hidden // 4, **MODELS[kind], **config}, group
    )
    for name, (rows, columns) in matrices(model.config).items():
        outside = not name.startswith("model.layers")
        if outside and not ternary_embedding:
            model.floats[f"{name}.weight"] = rng.standard_normal((rows, columns)).astype(np.float32)
            continue
        codes = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        codes[:, ::32] = 1  # Every group has a weight that is not 0.
        groups = -(-columns // group)
        found = rng.uniform(0.01, 0.05, (rows, groups)).astype(np.float16)
        if scales == "tensor":
            found[:] = oracle.round_to(rng.uniform(0.01, 0.05, 1).astype(np.float32), "bfloat16")
        model.codes[name], model.scales[name] = codes, found
    for name, size in vectors(kind, model.config).items():
        model.floats[name] = rng.uniform(0.5, 1.5, size).astype(np.float32)
    return model


def matrices(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    found = {"model.embed_tokens": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        found["lm_head"] = config["vocab_size"], hidden
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        found |= {f"{attention}.q_proj": (queries, hidden), f"{attention}.o_proj": (hidden, queries)}
        found |= {f"{attention}.{name}_proj": (keys, hidden) for name in "kv"}
        found |= {f"{mlp}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        found[f"{mlp}.down_proj"] = hidden, inner
    return found


def vectors(kind: str, config: Mapping[str, Any]) -> dict[str, int]:
    hidden = config["hidden_size"]
    found = {"model.norm.weight": hidden}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {f"{name}.input_layernorm.weight": hidden, f"{name}.post_attention_layernorm.weight": hidden}
        if kind == "qwen3":
            found |= {f"{name}.self_attn.{each}_norm.weight": config["head_dim"] for each in "qk"}
        if kind in ("bitnet", "1bitllm"):
            own = ("attn_sub_norm", "ffn_sub_norm") if kind == "bitnet" else ("inner_attn_ln", "ffn_layernorm")
            found[f"{name}.self_attn.{own[0]}.weight"] = hidden
            found[f"{name}.mlp.{own[1]}.weight"] = config["intermediate_size"]
    return found


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def packed_rows(codes: Array) -> Array:
    """Row r of R packed rows holds rows r, R + r, 2 R + r and 3 R + r; the last ones may be missing."""
    missing = np.zeros((-len(codes) % 4, codes.shape[1]), np.uint8)
    parts = np.concatenate([codes.astype(np.uint8) + 1, missing]).reshape(4, -1, codes.shape[1])
    packed: Array = (parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6).astype(np.uint8)
    return packed


def hugging_face(
    path: Path, model: TinyModel, tensors: Mapping[str, Array], quantization: dict[str, Any] | None = None
) -> Path:
    """A directory with the floats of a model and other tensors."""
    path.mkdir()
    config = {**model.config, **({} if quantization is None else {"quantization_config": quantization})}
    (path / "config.json").write_text(json.dumps(config))
    save_file({**model.floats, **tensors}, path / "model.safetensors")
    return path


def as_packed(model: TinyModel, divides: bool) -> dict[str, Array]:
    """Packed rows of a model with one scale per tensor."""
    tensors: dict[str, Array] = {}
    for name, codes in model.codes.items():
        scale = model.scales[name][0, :1].astype(np.float32)
        tensors |= {f"{name}.weight": packed_rows(codes), f"{name}.weight_scale": 1 / scale if divides else scale}
    return tensors


def as_floats(model: TinyModel, dtype: str = "float32") -> dict[str, Array]:
    return {f"{name}.weight": model.weight(name).astype(dtype) for name in model.codes}


# --- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}

Encoder = tuple[int, int, Callable[[Array, Array], bytes]]  # type id, weights per scale, writer
ENCODERS: dict[str, Encoder] = {
    "Q2_0 of 64": (42, 64, lambda codes, scales: q2_0(codes, scales, 64)),
    "Q2_0 of 128": (42, 128, lambda codes, scales: q2_0(codes, scales, 128)),
    "PQ2_0": (142, 128, lambda codes, scales: q2_0(codes, scales, 128)),
    "TQ2_0": (35, 256, tq2_0),
    "I2_S": (36, 128, lambda codes, scales: i2_s(codes, float(scales[0, 0]))),
}


def gguf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{part}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{part}"


def permuted(rows: Array, heads: int) -> Array:
    """As llama.cpp's converter stores q and k of some architectures: the two halves of a head in turns."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_metadata(model: TinyModel, architecture: str) -> dict[str, Any]:
    config = model.config
    keys = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


def gguf_tensors(model: TinyModel, encoding: str, permutes: bool) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    kind, _, encode = ENCODERS[encoding]
    heads = {"q_proj": model.config["num_attention_heads"], "k_proj": model.config["num_key_value_heads"]}
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
    for name, codes in model.codes.items():
        scales, count = model.scales[name], heads.get(name.rpartition(".")[2])
        if permutes and count is not None:
            codes, scales = permuted(codes, count), permuted(scales, count)
        tensors[gguf_name(f"{name}.weight")] = (codes.shape, kind, encode(codes, scales))
    for name, values in model.floats.items():
        tensors[gguf_name(name)] = (values.shape, 0, values.tobytes())
    return tensors


def gguf_file(
    path: Path, model: TinyModel, encoding: str, architecture: str, permutes: bool = False, **metadata: Any
) -> Path:
    """A GGUF file of a model, without a tokenizer unless the metadata hold one."""
    content = gguf_bytes(gguf_tensors(model, encoding, permutes), {**gguf_metadata(model, architecture), **metadata})
    path.write_bytes(content)
    return path


# --- BitLab's form ----------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file; bfloat16, which NumPy lacks, as float32."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    dtypes = {"U8": "u1", "I8": "i1", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}
    found: dict[str, Array] = {}
    for name, entry in json.loads(content[8:begin]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        values = np.frombuffer(content[begin + first : begin + last], dtypes[entry["dtype"]]).reshape(entry["shape"])
        found[name] = oracle.bfloat16_bits_to_float32(values) if entry["dtype"] == "BF16" else values
    return found


def unpack(packed: Array, columns: int) -> Array:
    """Codes of a packed weight of any layout, as docs/packed-format.md describes it, without a look at the trailer."""
    rows = len(packed)
    payload_columns = packed.shape[1] - -(-64 // rows)
    layouts = oracle.layouts_of(columns)
    (layout,) = (name for name in layouts if oracle.packed_columns(rows, columns, name)[0] == payload_columns)
    _, base, digits = oracle.LAYOUTS[layout]
    flat, steps = packed.reshape(-1), payload_columns // 4
    fields = np.empty((rows, steps, digits, 4), np.int8)
    for first in range(0, rows, oracle.TILE_ROWS):
        count = min(oracle.TILE_ROWS, rows - first)
        tile = flat[first * payload_columns :][: count * payload_columns].reshape(steps, count, 4)
        for digit in range(digits):
            fields[first : first + count, :, digit] = (tile // base**digit % base).swapaxes(0, 1)
    return fields.reshape(rows, -1)[:, :columns] - np.int8(1)
