"""The one decoder that ternary language models are: its config.json, and the tensors that it has.

An architecture is data: a class of transformers, the switches that are fixed in it, and what its config says where a
key is missing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitcore.exceptions import FileError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Architecture:
    """A class of transformers that computes as the decoder does."""

    model_type: str
    class_name: str
    head_norms: bool = False  # q_norm and k_norm, of every head before the rotation.
    sub_norms: bool = False  # attn_sub_norm before o_proj, ffn_sub_norm before down_proj.
    has_mlp_bias: bool = True  # Whether its config has the key.
    multipliers: bool = False  # Granite's four.
    defaults: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    each.model_type: each
    for each in (
        Architecture("llama", "LlamaForCausalLM"),
        Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True, has_mlp_bias=False, defaults={"head_dim": 128}),
        Architecture(
            "bitnet",
            "BitNetForCausalLM",
            sub_norms=True,
            has_mlp_bias=False,
            defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        ),
        Architecture("granite", "GraniteForCausalLM", multipliers=True),
    )
}

MOST_POSITIONS = 2**24  # As in the engine.

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
ACTIVATIONS = ("silu", "relu2", "gelu", "gelu_pytorch_tanh")

# What is known of some that are asked for and cannot be converted.
NOT_DECODERS = {
    "qwen35": "its layers are Gated DeltaNets, with attention in every fourth",
    "qwen3_5": "its layers are Gated DeltaNets, with attention in every fourth",
    "qwen3_next": "most of its layers are Gated DeltaNets",
    "minicpm3": "its attention is multi-head latent attention",
    "mixtral": "it has experts",
    "qwen3_moe": "it has experts",
    "qwen3moe": "it has experts",
    "gemma3": "its norms, embedding scale and windows are not those of this decoder",
    "bitnet-embedding": "it has a norm inside of every linear layer",
}

# The keys of rope_parameters besides rope_type and rope_theta: those that have to be there, and those that may.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}


def unknown_architecture(source: object, name: object) -> FileError:
    """What to say of an architecture that is not one of ARCHITECTURES."""
    known = ", ".join(each.class_name for each in ARCHITECTURES.values())
    stem = str(name).lower().replace("forcausallm", "").replace("forconditionalgeneration", "")
    why = f": {NOT_DECODERS[stem]}" if stem in NOT_DECODERS else ""
    return FileError(f"{source}: the architecture is {name}{why}; known are {known}, MiniCPM and 1bitLLM's BitNet")


@dataclass(frozen=True)
class Decoder:
    """A model: its config.json in the dialect of transformers 5, every key explicit, but for quantization_config."""

    architecture: Architecture
    config: dict[str, Any]

    def size(self, name: str) -> int:
        value: int = self.config[name]
        return value

    @property
    def tied(self) -> bool:
        return bool(self.config["tie_word_embeddings"])

    def linears(self) -> Iterator[tuple[str, tuple[int, int], bool]]:
        """Of every linear layer but the head: its name, (out_features, in_features), whether it has a bias."""
        hidden, inner = self.size("hidden_size"), self.size("intermediate_size")
        queries = self.size("num_attention_heads") * self.size("head_dim")
        keys = self.size("num_key_value_heads") * self.size("head_dim")
        attention, mlp = bool(self.config["attention_bias"]), bool(self.config.get("mlp_bias", False))
        for index in range(self.size("num_hidden_layers")):
            layer = f"model.layers.{index}"
            yield f"{layer}.self_attn.q_proj", (queries, hidden), attention
            yield f"{layer}.self_attn.k_proj", (keys, hidden), attention
            yield f"{layer}.self_attn.v_proj", (keys, hidden), attention
            yield f"{layer}.self_attn.o_proj", (hidden, queries), attention
            yield f"{layer}.mlp.gate_proj", (inner, hidden), mlp
            yield f"{layer}.mlp.up_proj", (inner, hidden), mlp
            yield f"{layer}.mlp.down_proj", (hidden, inner), mlp

    def vectors(self) -> Iterator[tuple[str, int]]:
        """Of every norm and every bias: the tensor's name and its size."""
        hidden, queries = self.size("hidden_size"), self.size("num_attention_heads") * self.size("head_dim")
        for index in range(self.size("num_hidden_layers")):
            layer = f"model.layers.{index}"
            yield f"{layer}.input_layernorm.weight", hidden
            yield f"{layer}.post_attention_layernorm.weight", hidden
            if self.architecture.head_norms:
                yield f"{layer}.self_attn.q_norm.weight", self.size("head_dim")
                yield f"{layer}.self_attn.k_norm.weight", self.size("head_dim")
            if self.architecture.sub_norms:
                yield f"{layer}.self_attn.attn_sub_norm.weight", queries
                yield f"{layer}.mlp.ffn_sub_norm.weight", self.size("intermediate_size")
        for name, (out_features, _), biased in self.linears():
            if biased:
                yield f"{name}.bias", out_features
        yield "model.norm.weight", hidden

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The embedding, and the head where it is not tied: the module's name and (rows, columns)."""
        shape = self.size("vocab_size"), self.size("hidden_size")
        yield EMBEDDING, shape
        if not self.tied:
            yield HEAD, shape


def checked_decoder(source: object, architecture: Architecture, config: dict[str, Any]) -> Decoder:
    """A Decoder of a config that holds every key, and nothing that this decoder does not compute.

    Raises:
        FileError: a size that is no positive integer, an unknown activation, sizes that do not fit together.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise FileError(f"{source}: {name} is {value!r}, expected a positive integer")
    if (positions := config["max_position_embeddings"]) > MOST_POSITIONS:
        raise FileError(f"{source}: max_position_embeddings is {positions}, expected at most {MOST_POSITIONS}")
    for name in ("rms_norm_eps", *(MULTIPLIERS if architecture.multipliers else ())):
        _require_positive(source, name, config[name])
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config.get(name, False), bool):
            raise FileError(f"{source}: {name} is {config[name]!r:.80}, expected true or false")
    ends = config.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < 2**31:
            raise FileError(f"{source}: eos_token_id is {ends!r:.80}, expected a token, or several")
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % key_heads:
        raise FileError(
            f"{source}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads {key_heads}"
        )
    if config["head_dim"] % 2:
        raise FileError(f"{source}: head_dim is {config['head_dim']}, expected an even number")
    if not isinstance(config["hidden_act"], str) or config["hidden_act"] not in ACTIVATIONS:
        raise FileError(f"{source}: hidden_act is {config['hidden_act']!r}, expected one of {', '.join(ACTIVATIONS)}")
    return Decoder(architecture, config)


def _require_positive(source: object, name: str, value: object) -> None:
    """A number that is one in float32, too, and not subnormal there."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 2.0**-126 <= value < 2.0**128:  # type: ignore[operator]
        raise FileError(f"{source}: {name} is {value!r:.80}, expected a positive number")


def checked_rope(source: object, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters with all that is needed, and nothing that is unknown.

    Raises:
        FileError
    """
    rope = {name: value for name, value in parameters.items() if value is not None}
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    if kind == "su":  # What longrope was called first.
        kind = "longrope"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        why = " (it changes with the length: the same tokens would give other logits)" if kind == "dynamic" else ""
        raise FileError(f"{source}: rope_type is {kind!r}{why}, known are {known}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise FileError(f"{source}: partial_rotary_factor is given: only a part of each head would be rotated")
    needed, allowed = ROPE_KEYS[kind]
    if missing := sorted(set(needed) - rope.keys()):
        raise FileError(f"{source}: rope_parameters of type {kind} lack {missing}")
    if unknown := sorted(rope.keys() - {*needed, *allowed, "rope_theta"}):
        raise FileError(f"{source}: rope_parameters have {unknown}, known of type {kind} are {[*needed, *allowed]}")
    for name, value in rope.items():
        if name.endswith(("short_factor", "long_factor")):
            if not isinstance(value, list):
                raise FileError(f"{source}: {name} is {value!r:.80}, expected positive numbers")
            for each in value:
                _require_positive(source, name, each)
        elif name != "truncate":
            _require_positive(source, name, value)
    return {"rope_type": kind, **rope}
