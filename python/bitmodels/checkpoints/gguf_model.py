"""What the metadata of a GGUF file say, as a Decoder, and where its tensors belong."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitcore.exceptions import FileError
from bitmodels.checkpoints.decoder import (
    ARCHITECTURES,
    Decoder,
    checked_decoder,
    checked_rope,
    unknown_architecture,
)
from bitmodels.checkpoints.stored import Checkpoint, StoredTensor

_ACTIVATIONS_BY_NAME = {"bitnet-b1.58": "relu2", "bitnet-25": "relu2"}


@dataclass(frozen=True)
class _Kind:
    """A value of general.architecture: the model_type, and whether the writer permuted the rows of q and k."""

    model_type: str
    permuted: bool = False
    bitnet: bool = False


_KINDS = {
    "llama": _Kind("llama", permuted=True),
    "qwen3": _Kind("qwen3"),
    "bitnet": _Kind("bitnet", bitnet=True),
    "bitnet-25": _Kind("bitnet", bitnet=True),
    "bitnet-b1.58": _Kind("bitnet", bitnet=True),
    "granite": _Kind("granite", permuted=True),
    "minicpm": _Kind("granite", permuted=True),
}

# The names of tensors: GGUF's, and transformers'.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Llama 3's scaling is stored as a divisor of every frequency: these are the parameters that have been published.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufModel:
    """A file's model, its tensors by transformers' names, and whether its definition quantizes activations."""

    decoder: Decoder
    tensors: dict[str, StoredTensor]
    permuted: bool
    bitnet: bool

    def row_order(self, name: str, rows: int) -> NDArray[np.int64] | None:
        """Which stored rows are those of transformers, in order: rotary pairs lie apart there and adjacent here.

        None where they are in order.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
        if not self.permuted or heads is None:
            return None
        return np.arange(rows).reshape(self.decoder.size(heads), -1, 2).swapaxes(1, 2).ravel()


def read_model(checkpoint: Checkpoint, hidden_act: str | None = None) -> GgufModel:
    """Reads the metadata of a GGUF file.

    Args:
        hidden_act: The activation, for an architecture that is written with two and does not say which.

    Raises:
        FileError: an architecture, a rotation or a key that is unknown or that the decoder cannot do.
    """
    reader = _Metadata(checkpoint)
    name = str(checkpoint.metadata.get("general.architecture"))
    if name not in _KINDS:
        raise unknown_architecture(checkpoint.path, name)
    if rotation := sorted(key for key in checkpoint.metadata if key.startswith("prism.hadamard")):
        raise FileError(
            f"{checkpoint.path}: its weights are in a rotated basis ({rotation[0]}), and the rotation of the "
            "activations that undoes it is not built: without it the model writes fluent garbage"
        )
    kind = _KINDS[name]
    config = _config(checkpoint, reader, kind, hidden_act)
    decoder = checked_decoder(checkpoint.path, ARCHITECTURES[kind.model_type], config)
    return GgufModel(decoder, dict(_renamed(checkpoint)), kind.permuted, kind.bitnet)


class _Metadata:
    """The keys of a file's architecture."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.values = checkpoint.metadata
        self.prefix = str(checkpoint.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.prefix}.{key}", default)

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FileError(f"{self.path}: {self.prefix}.{key} is {value!r}, expected a positive number")
        return value

    def size(self, key: str) -> int:
        value = self.number(key)
        if not isinstance(value, int):
            raise FileError(f"{self.path}: {self.prefix}.{key} is {value!r}, expected an integer")
        return value


def _config(checkpoint: Checkpoint, reader: _Metadata, kind: _Kind, hidden_act: str | None) -> dict[str, Any]:
    architecture = ARCHITECTURES[kind.model_type]
    tensors = checkpoint.tensors
    if (embedding := tensors.get("token_embd.weight")) is None:
        raise FileError(f"{checkpoint.path}: has no tensor token_embd.weight")
    hidden, heads = reader.size("embedding_length"), reader.size("attention.head_count")
    head_dim = reader.get("attention.key_length") or hidden // heads
    if reader.get("attention.value_length", head_dim) != head_dim:
        raise FileError(f"{checkpoint.path}: keys have {head_dim} dimensions and values another number")
    if reader.get("attention.sliding_window"):
        raise FileError(f"{checkpoint.path}: sliding_window is {reader.get('attention.sliding_window')}, expected none")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.size("feed_forward_length"),
        "num_hidden_layers": reader.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.get("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "hidden_act": _activation(checkpoint, reader.prefix, kind, hidden_act),
        "max_position_embeddings": reader.size("context_length"),
        "rms_norm_eps": _shortest(reader.number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if architecture.has_mlp_bias:
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if architecture.multipliers:
        config |= _multipliers(reader, head_dim)
    config["rope_parameters"] = _rope(checkpoint, reader, head_dim)
    for name in ("bos", "eos"):
        if (number := checkpoint.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = number
    config |= {"initializer_range": 0.02, "use_cache": True, "dtype": "float32"}
    return config


def _shortest(value: float) -> float:
    """The decimal number that a float32 was written for: 1e-05, not 9.99999974737875e-06."""
    return float(str(np.float32(value)))


def _activation(checkpoint: Checkpoint, name: str, kind: _Kind, given: str | None) -> str:
    """The activation of the feed-forward layers, which GGUF has no key for.

    2B-4T needs squared ReLU and 1bitLLM's models SiLU; llama.cpp computes SiLU for "bitnet", whatever was meant.
    """
    if not kind.bitnet:
        return "silu"
    if known := _ACTIVATIONS_BY_NAME.get(name):
        return known
    if given is not None:
        return given
    if checkpoint.metadata.get("tokenizer.ggml.model") == "llama":  # Only 1bitLLM's have a SentencePiece vocabulary.
        return "silu"
    raise FileError(
        f'{checkpoint.path}: architecture "{name}" is written for models with SiLU and with squared ReLU, and nothing '
        "in the file says which this is: give bitlab convert --hidden-act silu or relu2"
    )


def _multipliers(reader: _Metadata, head_dim: int) -> dict[str, float]:
    attention = reader.number("attention.scale") if reader.get("attention.scale") else None
    return {
        "embedding_multiplier": _shortest(reader.number("embedding_scale")),
        "residual_multiplier": _shortest(reader.number("residual_scale")),
        "logits_scaling": _shortest(reader.number("logit_scale")),
        "attention_multiplier": _shortest(attention) if attention else 1.0 / math.sqrt(head_dim),
    }


def _rope(checkpoint: Checkpoint, reader: _Metadata, head_dim: int) -> dict[str, Any]:
    if (rotated := reader.get("rope.dimension_count", head_dim)) != head_dim:
        raise FileError(f"{checkpoint.path}: {rotated} of {head_dim} dimensions are rotated, expected all")
    theta = reader.number("rope.freq_base") if reader.get("rope.freq_base") is not None else 10000.0
    rope: dict[str, Any] = {"rope_theta": _shortest(theta)}
    original = reader.get("rope.scaling.original_context_length")
    if (factor := reader.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise FileError(f"{checkpoint.path}: rope.scaling.attn_factor is {factor}, expected 1")
    kind = reader.get("rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": _shortest(reader.number("rope.scaling.factor"))}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": _shortest(reader.number("rope.scaling.factor"))}
        rope["original_max_position_embeddings"] = original
        rope |= _yarn(reader)
    elif kind == "longrope" or "rope_factors_long.weight" in checkpoint.tensors:
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        for name in ("short", "long"):
            rope[f"{name}_factor"] = _factors(checkpoint, f"rope_factors_{name}.weight").tolist()
    elif kind != "none":
        raise FileError(f"{checkpoint.path}: rope.scaling.type is {kind!r}, known are none, linear, yarn and longrope")
    elif "rope_freqs.weight" in checkpoint.tensors:
        rope |= _llama3(checkpoint, theta, head_dim)
    return checked_rope(checkpoint.path, rope)


def _yarn(reader: _Metadata) -> dict[str, float]:
    names = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
    return {name: _shortest(reader.number(key)) for name, key in names.items() if reader.get(key)}


def _factors(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    tensor = checkpoint.tensors.get(name)
    if tensor is None or tensor.encoding != "float32":
        raise FileError(f"{checkpoint.path}: {name} is {tensor and tensor.encoding}, expected float32")
    return tensor.data.view("<f4")


def _llama3(checkpoint: Checkpoint, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of the scaling whose divisors the file holds."""
    stored = _factors(checkpoint, "rope_freqs.weight")
    if len(stored) == head_dim // 2:
        if (stored == 1).all():
            return {}
        for factor in _LLAMA3_FACTORS:
            rope = {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
            if np.allclose(stored, _llama3_divisors(rope, theta, head_dim), rtol=1e-5):
                return rope
    raise FileError(f"{checkpoint.path}: rope_freqs.weight has divisors of frequencies that no known scaling has")


def _llama3_divisors(rope: Mapping[str, Any], theta: float, head_dim: int) -> NDArray[np.float64]:
    """By which Llama 3.1 divides each frequency: 1 for short waves, factor for long ones, smoothly in between."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _renamed(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor with the name that transformers gives it.

    Raises:
        FileError: a tensor that the decoder does not have.
    """
    for name, tensor in checkpoint.tensors.items():
        if name in ROPE_FACTORS:
            continue
        module, _, part = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        own = f"model.layers.{block[1]}.{_INSIDE[block[2]]}" if block and block[2] in _INSIDE else _OUTSIDE.get(module)
        if own is None or part not in ("weight", "bias", "scale"):
            raise FileError(f"{checkpoint.path}: has a tensor {name}, which the model does not have")
        if part == "scale":
            if tensor.encoding != "float32" or not (tensor.data.view("<f4") == 1).all():
                raise FileError(f"{checkpoint.path}: {name} is a scale beside the scales of the weight, expected 1")
            continue
        yield f"{own}.{part}", tensor
