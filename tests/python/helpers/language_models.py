"""Tiny language models with every switch, and their logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitmodels import LanguageModel
from bitmodels.native_model import Append
from checkpoints import TinyModel, tiny

IDS = [(37 * i + 11) % 96 for i in range(60)]
CACHES = ("float16", "float32", "int8")


def biased(kind: str, **options: Any) -> TinyModel:
    model = tiny(kind, attention_bias=True, mlp_bias=True, **options)
    for name, codes in list(model.codes.items()):
        if "layers" in name:
            model.floats[f"{name}.bias"] = np.linspace(-0.2, 0.3, len(codes), dtype=np.float32)
    return model


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 50 for i in range(16)], "long_factor": [1.0 + i for i in range(16)],
}  # fmt: skip

# Every switch, both layouts, all granularities, tied and untied, all kinds of heads.
MODELS: dict[str, tuple[Callable[[], TinyModel], dict[str, Any]]] = {
    "llama, int8 head": (lambda: tiny("llama", scales="tensor"), {}),
    "llama, rows, float head": (lambda: tiny("llama", 1 << 20, attention_bias=False), {"head": "keep"}),
    "llama, biases, llama3": (lambda: biased("llama", group=64, rope_scaling=LLAMA3), {"layout": "1.6bit"}),
    "llama, gelu, linear": (
        lambda: tiny("llama", 32, hidden_act="gelu", rope_scaling={"type": "linear", "factor": 2.0}),
        {},
    ),
    "llama, tanh gelu": (lambda: tiny("llama", 64, hidden_act="gelu_pytorch_tanh"), {}),
    "bitnet, tied int8": (lambda: tiny("bitnet", scales="tensor", tied=True), {"layout": "1.6bit"}),
    "qwen3, tied ternary, YaRN": (
        lambda: tiny("qwen3", 64, ternary_embedding=True, tied=True, rope_scaling=YARN),
        {},
    ),
    "qwen3, untied ternary": (
        lambda: tiny("qwen3", 128, ternary_embedding=True, hidden=160, inner=264),
        {"layout": "1.6bit"},
    ),
    "minicpm, longrope": (lambda: tiny("minicpm", 64, rope_scaling=LONGROPE), {}),
}


def all_logits(model: LanguageModel, cache: Any = "float16", parts: Sequence[int] = (60,)) -> Any:
    """Of IDS, appended in parts of these sizes."""
    session, found, first = model.session(0, cache), [], 0
    for size in parts:
        found += model.forward([Append(session, IDS[first : first + size], "all")]) or []
        first += size
    return np.concatenate(found)


def hash_of(logits: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()[:16]
