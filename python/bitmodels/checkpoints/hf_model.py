"""What config.json of a Hugging Face directory says, in both dialects of transformers, as a Decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitcore.exceptions import FileError
from bitmodels.checkpoints.decoder import (
    ARCHITECTURES,
    MULTIPLIERS,
    Architecture,
    Decoder,
    checked_decoder,
    checked_rope,
    unknown_architecture,
)

Convention = Literal["multiply", "divide"]

# Where the names of a checkpoint's tensors differ from those of the class that computes it.
_RENAMED_1BITLLM = {"inner_attn_ln": "attn_sub_norm", "ffn_layernorm": "ffn_sub_norm"}

# Keys that config.json keeps as they are.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory's model, and how its weights are to be read."""

    decoder: Decoder
    scales: Convention | None  # Of packed weights; None: config.json does not say.
    quantize: bool  # Whether float weights are masters, which are quantized in every forward.
    bitnet: bool  # Whether its definition quantizes activations, to int8 per token.
    float_modules: tuple[str, ...]  # modules_to_not_convert
    renamed: Mapping[str, str]

    def stored_name(self, name: str) -> str:
        """The name in the checkpoint of a tensor of the class."""
        for stored, own in self.renamed.items():
            name = name.replace(f".{own}.", f".{stored}.")
        return name


def read_model(path: Path, config: Mapping[str, Any]) -> HuggingFaceModel:
    """Reads config.json.

    Raises:
        FileError: an architecture, a key or a quantization that is unknown or that the decoder cannot do.
    """
    source = path / "config.json"
    if not config:
        raise FileError(f"{source}: is not there, and without it the architecture cannot be told")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else config.get("model_type")
    renamed: dict[str, str] = {}
    if name == "MiniCPMForCausalLM":
        architecture, config = ARCHITECTURES["granite"], _as_granite(source, config)
    elif name == "BitnetForCausalLM":
        architecture, renamed = ARCHITECTURES["bitnet"], _RENAMED_1BITLLM
        config = {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6, **config}
    else:
        architecture = _architecture(source, name)
    quantization = _quantization(source, config)
    is_1bitllm = bool(renamed)
    linear_class = quantization.get("linear_class", "bitlinear")
    online = linear_class == "autobitlinear" and quantization.get("quantization_mode", "offline") == "online"
    return HuggingFaceModel(
        _decoder(source, architecture, config),
        None if not quantization else {"bitlinear": "divide", "autobitlinear": "multiply"}.get(linear_class),  # type: ignore[arg-type]
        online or is_1bitllm,
        bool(quantization) or is_1bitllm,
        tuple(quantization.get("modules_to_not_convert") or ()),
        renamed,
    )


def _architecture(source: Path, name: Any) -> Architecture:
    for each in ARCHITECTURES.values():
        if name in (each.class_name, each.model_type):
            return each
    raise unknown_architecture(source, name)


def _quantization(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of a BitNet; empty where nothing is quantized."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FileError(f"{source}: quantization_config is {quantization!r}, expected an object")
    method = quantization.get("quant_method")
    if method == "bitlab":
        raise FileError(f"{source}: is in BitLab's own form already")
    if quantization and method != "bitnet":
        raise FileError(f'{source}: quant_method is {method!r}, expected "bitnet" or none')
    if quantization.get("use_rms_norm"):
        raise FileError(
            f"{source}: use_rms_norm is true: its linear layers have norms of their own, which are not read"
        )
    for name in ("linear_class", "quantization_mode"):
        if not isinstance(quantization.get(name, ""), str):
            raise FileError(f"{source}: {name} is {quantization[name]!r:.80}, expected a text")
    listed = quantization.get("modules_to_not_convert") or []
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise FileError(f"{source}: modules_to_not_convert is {listed!r:.80}, expected names")
    return quantization


def _as_granite(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM's scalar multipliers in the terms of Granite, which computes the same."""
    values = {}
    for name in ("scale_emb", "scale_depth", "dim_model_base", "hidden_size", "num_hidden_layers"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FileError(f"{source}: {name} is {value!r}, expected a positive number")
        values[name] = value
    head_dim = config.get("head_dim") or values["hidden_size"] // _size(source, config, "num_attention_heads")
    return {
        **config,
        "embedding_multiplier": values["scale_emb"],
        "residual_multiplier": values["scale_depth"] / math.sqrt(values["num_hidden_layers"]),
        "logits_scaling": values["hidden_size"] / values["dim_model_base"],
        "attention_multiplier": 1.0 / math.sqrt(head_dim),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _size(source: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FileError(f"{source}: {name} is {value!r}, expected a positive integer")
    return value


def _decoder(source: Path, architecture: Architecture, config: Mapping[str, Any]) -> Decoder:
    defaults = {**_DEFAULTS, **architecture.defaults}
    if config.get("use_sliding_window") or (config.get("sliding_window") and "use_sliding_window" not in config):
        raise FileError(f"{source}: sliding_window is {config.get('sliding_window')}, expected full attention")
    if config.get("pretraining_tp", 1) not in (1, None):
        raise FileError(f"{source}: pretraining_tp is {config['pretraining_tp']}, expected 1")
    heads, hidden = _size(source, config, "num_attention_heads"), _size(source, config, "hidden_size")
    own: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": config.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or defaults.get("head_dim") or hidden // heads,
    }
    for name in ("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias"):
        own[name] = config.get(name, defaults[name])
    if architecture.has_mlp_bias:
        own["mlp_bias"] = config.get("mlp_bias", False)
    if architecture.multipliers:
        own |= {name: config.get(name, 1.0) for name in MULTIPLIERS}
    own |= {name: config[name] for name in _TOKENS if name in config}
    own["rope_parameters"] = _rope(source, config, defaults["rope_theta"])
    own["initializer_range"] = config.get("initializer_range", 0.02)
    own["use_cache"] = True
    own["dtype"] = config.get("dtype") or config.get("torch_dtype") or "float32"
    return checked_decoder(source, architecture, own)


def _rope(source: Path, config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """rope_parameters, from either dialect."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise FileError(f"{source}: rope_parameters are {parameters!r}, expected an object")
    parameters = {"rope_theta": config.get("rope_theta", theta), **parameters}
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind in ("longrope", "su", "yarn", "llama3") and "original_max_position_embeddings" in config:
        parameters.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return checked_rope(source, parameters)
