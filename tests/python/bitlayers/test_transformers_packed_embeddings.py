"""Ternary and int8 embeddings and heads in models of transformers: checkpoints made by hand, against float models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitcore.config import BitQuantConfig
from bitcore.exceptions import FileError, StateError
from bitcore.ops import bitlinear
from bitcore.ops.base import dequantize_weight
from bitcore.ops.packing import unpack_weights
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, Int8Embedding, Int8Linear, TernaryEmbedding, quantize_int8_rows, summary
from bitlayers.transformers import BitLabConfig

pytestmark = pytest.mark.medium  # Importing transformers takes seconds.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.tensor([[3, 0, 129, 77, 5, 128, 64, 1]])
GROUPS = BitQuantConfig("per_group", "int8", "per_group", 32)
EMBEDDING, HEAD, UP = "model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"
FIRST = "model.layers.0.self_attn.q_proj"
SIZES: dict[str, Any] = {
    "vocab_size": 130,  # The last tile of 16 rows is not full.
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "bitnet": (BitNetForCausalLM, BitNetConfig),
}
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8"},
    "2bit": {"kind": "ternary"},
    "1.6bit": {"kind": "ternary", "layout": "1.6bit"},
}
TIED = ("tied", "own head", "head alone")


def built(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A float model of random weights, no two matrices of which are the same memory."""
    config = FAMILIES[family][1]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, "eos_token_id": None, **fields}), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.1)
    return model


class Checkpoint:
    """What a converter writes, and the float model that it stands for."""

    def __init__(
        self, directory: Path, kind: str, tied: str, family: str = "llama", dtype: torch.dtype = torch.float32
    ) -> None:
        self.directory = directory
        self.plain = built(family, dtype, tie_word_embeddings=tied == "tied")
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        for name, tensor in self.plain.state_dict().items():
            module = name.removesuffix(".weight")
            if name.endswith("_proj.weight"):
                self.put(module, tensor, {"kind": "ternary"})
            elif module not in (EMBEDDING, HEAD) or (tied, module) == ("head alone", EMBEDDING):
                self.tensors[name] = tensor.clone()
            elif (tied, module) != ("tied", HEAD):
                self.put(module, tensor, KINDS[kind])
        if tied != "head alone":
            self.modules[EMBEDDING] = KINDS[kind]
        self.modules[HEAD] = KINDS[kind]
        self.modules[UP] = {"kind": "ternary", "layout": "2bit"}  # It need not differ.
        self.tensors[f"{FIRST}.weight"] = torch.empty(0, dtype=torch.uint8)  # Stops readers that do not know it.
        self.write()

    def put(self, module: str, weight: Tensor, fields: dict[str, Any]) -> None:
        """The codes and scales of a matrix into the checkpoint, and their product into the float model."""
        if fields["kind"] == "int8":
            codes, scale = quantize_int8_rows(weight)
            self.tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
            self.plain.get_submodule(module).weight.data = (codes.float() * scale[:, None]).to(weight.dtype)
            return
        scale, qweight = bitlinear.prepare_weights(weight, GROUPS, fields.get("layout", "2bit"))
        self.tensors |= {f"{module}.qweight": qweight, f"{module}.qweight_scale": scale}
        values = dequantize_weight(unpack_weights(qweight, weight.shape[1]), scale, GROUPS)
        self.plain.get_submodule(module).weight.data = values.to(weight.dtype)

    def write(self, **fields: Any) -> None:
        """A directory; `fields` are of quantization_config."""
        config = self.plain.config.to_dict()
        config |= {"architectures": [type(self.plain).__name__], "dtype": str(self.plain.dtype).split(".")[1]}
        config["quantization_config"] = {
            "quant_method": "bitlab",
            "format": 1,
            **GROUPS.to_dict(),
            "layout": "2bit",
            "state": "deployed",
            "modules": self.modules,
            **fields,
        }
        self.directory.mkdir(exist_ok=True)
        (self.directory / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, self.directory / "model.safetensors", {"format": "pt"})

    def load(self, **options: Any) -> Any:
        auto: Any = AutoModelForCausalLM
        model, report = auto.from_pretrained(self.directory, output_loading_info=True, dtype="auto", **options)
        assert not any(report.values()), report
        return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
    return y


def classes_of(kind: str) -> tuple[type[nn.Module], type[nn.Module]]:
    return (Int8Embedding, Int8Linear) if kind == "int8" else (TernaryEmbedding, BitLinear)


def parts_of(module: Any) -> list[Tensor]:
    if isinstance(module, Int8Embedding | Int8Linear):
        return [module.weight, module.weight_scale]
    return [module.qweight, module.qweight_scale]


def saved(model: Any, directory: Path) -> bytes:
    model.save_pretrained(directory)
    return (directory / "model.safetensors").read_bytes()


kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


# --- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", TIED)
@kinds
def test_what_a_checkpoint_says_is_what_is_loaded(kind: str, tied: str, family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, kind, tied, family)
    model = checkpoint.load()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is (nn.Embedding if tied == "head alone" else classes_of(kind)[0])
    assert type(head) is classes_of(kind)[1]
    assert model.config.tie_word_embeddings == (tied == "tied")
    if tied != "head alone":
        shared = [one is other for one, other in zip(parts_of(embedding), parts_of(head), strict=True)]
        assert shared == [tied == "tied"] * 2
    assert_same_bits(embedding(IDS), checkpoint.plain.get_input_embeddings()(IDS))
    hidden = torch.randn(2, 3, SIZES["hidden_size"])
    expected = checkpoint.plain.get_output_embeddings()(hidden)
    if isinstance(head, BitLinear):  # The float head does not quantize activations.
        head.quant_config = BitQuantConfig("per_group", "float32", group_size=32)
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", TIED)
@dtypes
@kinds
def test_what_is_saved_again_is_the_same(kind: str, dtype: torch.dtype, tied: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "made", kind, tied, dtype=dtype)
    model = checkpoint.load()
    assert model.dtype == dtype
    assert model.get_input_embeddings()(IDS).dtype == logits(model).dtype == dtype
    once = saved(model, tmp_path / "once")
    tensors = load_file(tmp_path / "once" / "model.safetensors")
    assert tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == checkpoint.tensors[name].dtype, name
        assert torch.equal(tensor, checkpoint.tensors[name]), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype="auto")
    assert_same_bits(logits(again), logits(model))
    assert saved(again, tmp_path / "twice") == once
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert one == two
    listed = {name: one["quantization_config"]["modules"].get(name) for name in (EMBEDDING, HEAD)}
    assert listed == {EMBEDDING: None if tied == "head alone" else KINDS[kind], HEAD: KINDS[kind]}


@kinds
def test_a_head_that_is_not_listed_is_what_it_is_tied_to(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, kind, "tied")
    expected = logits(checkpoint.load())
    del checkpoint.modules[HEAD]
    checkpoint.write()
    model = checkpoint.load()
    assert type(model.lm_head) is classes_of(kind)[1]
    assert_same_bits(logits(model), expected)


@kinds
def test_a_head_that_the_checkpoint_has_is_not_tied(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "made", kind, "own head")
    checkpoint.plain.config.tie_word_embeddings = True
    checkpoint.write()
    model = checkpoint.load()
    for name in ("weight", "weight_scale") if kind == "int8" else ("qweight", "qweight_scale"):
        assert torch.equal(getattr(model.lm_head, name), checkpoint.tensors[f"{HEAD}.{name}"])
    assert not torch.equal(parts_of(model.lm_head)[0], parts_of(model.model.embed_tokens)[0])
    saved(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == checkpoint.tensors.keys()


def test_kinds_may_differ(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "int8", "own head")
    checkpoint.put(HEAD, built().lm_head.weight, KINDS["2bit"])
    del checkpoint.tensors[f"{HEAD}.weight"], checkpoint.tensors[f"{HEAD}.weight_scale"]
    checkpoint.modules[HEAD] = KINDS["2bit"]
    checkpoint.plain.config.tie_word_embeddings = True
    checkpoint.write()
    model = checkpoint.load()
    assert (type(model.model.embed_tokens), type(model.lm_head)) == (Int8Embedding, BitLinear)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@kinds
def test_device_maps(kind: str, device_map: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, kind, "tied")
    model = checkpoint.load(device_map=device_map)
    assert parts_of(model.lm_head)[0] is parts_of(model.model.embed_tokens)[0]
    assert_same_bits(logits(model), logits(checkpoint.load()))


@kinds
def test_what_is_moved_and_copied_stays_tied(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "made", kind, "tied")
    model = checkpoint.load()
    expected = logits(model)
    for each in (copy.deepcopy(model), model._apply(lambda tensor: tensor.clone())):
        each.tie_weights()
        assert parts_of(each.lm_head)[0] is parts_of(each.model.embed_tokens)[0]
        assert_same_bits(logits(each), expected)
        assert saved(each, tmp_path / "again") == saved(checkpoint.load(), tmp_path / "plain")


@kinds
def test_base_models_and_other_heads(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "made", kind, "tied")
    model = checkpoint.load()
    base = LlamaModel.from_pretrained(tmp_path / "made")
    assert type(base.embed_tokens) is classes_of(kind)[0]
    with torch.no_grad():
        assert_same_bits(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    classifier = LlamaForSequenceClassification.from_pretrained(tmp_path / "made")
    assert type(classifier.score) is nn.Linear
    assert type(classifier.get_input_embeddings()) is classes_of(kind)[0]
    saved(base, tmp_path / "base")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert_same_bits(logits(whole), logits(model))


@kinds
@pytest.mark.parametrize("tied", ["tied", "own head"])
def test_a_float_checkpoint(kind: str, tied: str, tmp_path: Path) -> None:
    plain = built(tie_word_embeddings=tied == "tied")
    plain.save_pretrained(tmp_path / "float")
    fields = {name: value for name, value in KINDS[kind].items() if name != "layout"}
    config = BitLabConfig(**GROUPS.to_dict(), state="deployed", modules={EMBEDDING: fields, HEAD: fields})
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert (type(model.model.embed_tokens), type(model.lm_head)) == classes_of(kind)
    assert (parts_of(model.lm_head)[0] is parts_of(model.model.embed_tokens)[0]) == (tied == "tied")
    if kind == "int8":
        codes, scale = quantize_int8_rows(plain.lm_head.weight)
        assert torch.equal(model.lm_head.weight, codes)
        assert torch.equal(model.lm_head.weight_scale, scale)
    saved(model, tmp_path / "packed")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


# --- using ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", TIED)
@kinds
def test_generate(kind: str, tied: str, tmp_path: Path) -> None:
    model = Checkpoint(tmp_path, kind, tied).load()
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    tokens = IDS
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert made.tolist() == tokens.tolist()


@pytest.mark.parametrize("kind", ["int8", "1.6bit"])
def test_a_whole_model_compiles(kind: str, tmp_path: Path) -> None:
    model = Checkpoint(tmp_path, kind, "tied").load()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


@dtypes
@kinds
def test_adapters_train(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Checkpoint(tmp_path / "made", kind, "tied", dtype=dtype).load()
    before = [tensor.clone() for tensor in parts_of(model.lm_head)]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for tensor, unchanged in zip(parts_of(model.lm_head), before, strict=True):
        assert torch.equal(tensor, unchanged)
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("tied", TIED)
@kinds
def test_dequantize(kind: str, tied: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "made", kind, tied, dtype=torch.bfloat16)
    model = checkpoint.load().dequantize()
    assert (type(model.model.embed_tokens), type(model.lm_head)) == (nn.Embedding, nn.Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (tied == "tied")
    assert_same_bits(logits(model), logits(checkpoint.plain))
    saved(model, tmp_path / "float")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float")), logits(model))
    model.resize_token_embeddings(140)
    assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 140


@pytest.mark.parametrize("tied", TIED)
@kinds
def test_resizing_is_refused(kind: str, tied: str, tmp_path: Path) -> None:
    model = Checkpoint(tmp_path, kind, tied).load()
    with pytest.raises(StateError, match="resize_token_embeddings: the embedding or the head is packed"):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == 130


def test_summaries_have_them(tmp_path: Path) -> None:
    listed = {layer.name: layer for layer in summary(Checkpoint(tmp_path, "int8", "tied").load()).layers}
    for name in (EMBEDDING, HEAD):
        layer = listed[name]
        assert (layer.kind, layer.state, layer.out_features, layer.in_features) == ("int8", "deployed", 130, 72)
        assert layer.bytes == 130 * 72 + 4 * 130


def test_beside_trainable_layers(tmp_path: Path) -> None:
    plain = built(tie_word_embeddings=True)
    plain.save_pretrained(tmp_path / "float")
    config = BitLabConfig("per_channel", modules={EMBEDDING: {"kind": "ternary"}})
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert model.get_submodule(UP).weight.requires_grad
    assert parts_of(model.lm_head)[0] is parts_of(model.model.embed_tokens)[0]
    saved(model, tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (found["state"], found["modules"][HEAD]) == ("trainable", {"kind": "ternary", "state": "deployed"})
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.get_submodule(UP).weight.requires_grad
    assert_same_bits(logits(again), logits(model))


# --- errors -----------------------------------------------------------------------------------------------------------


def cut(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def flip(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name][0, 0].bitwise_xor_(1)


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].fill_(value)


def widen(name: str) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].float()

    return change


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("2bit", flip(f"{EMBEDDING}.qweight"), f"{EMBEDDING}.qweight: qweight is damaged"),
        ("1.6bit", flip(f"{EMBEDDING}.qweight"), f"{EMBEDDING}.qweight: qweight is damaged"),
        ("2bit", fill(f"{EMBEDDING}.qweight_scale", -1), f"{EMBEDDING}.qweight_scale holds a scale that is not"),
        ("2bit", cut(f"{EMBEDDING}.qweight"), f"the checkpoint has no {EMBEDDING}.qweight,"),
        ("2bit", cut(f"{EMBEDDING}.qweight_scale"), f"the checkpoint has no {EMBEDDING}.qweight_scale"),
        ("2bit", cut(f"{HEAD}.qweight"), f"the checkpoint has no {HEAD}.qweight,"),
        ("int8", fill(f"{EMBEDDING}.weight", -128), f"{EMBEDDING}.weight holds the code -128"),
        ("int8", widen(f"{EMBEDDING}.weight"), f"{EMBEDDING}.weight has dtype torch.float32, expected torch.int8"),
        ("int8", fill(f"{HEAD}.weight_scale", torch.inf), f"{HEAD}.weight_scale holds a scale that is not"),
        ("int8", fill(f"{HEAD}.weight_scale", 0), f"{HEAD}.weight_scale holds a scale that is not"),
        ("int8", cut(f"{EMBEDDING}.weight"), f"the checkpoint has no {EMBEDDING}.weight,"),
        ("int8", cut(f"{HEAD}.weight_scale"), f"the checkpoint has no {HEAD}.weight_scale"),
    ],
)
def test_damaged_checkpoints(
    kind: str, damage: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path, kind, "own head", dtype=torch.bfloat16)
    damage(checkpoint.tensors)
    checkpoint.write()
    with pytest.raises(FileError, match=message):
        checkpoint.load()


@pytest.mark.parametrize("part", ["qweight", "qweight_scale"])
def test_what_is_tied_is_missing(part: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "2bit", "tied")
    del checkpoint.tensors[f"{EMBEDDING}.{part}"]
    checkpoint.write()
    with pytest.raises(FileError, match=f"the checkpoint has no {EMBEDDING}.{part},"):
        checkpoint.load()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("model.norm", {"kind": "int8"}, "kind of model.norm is 'int8', and it is a LlamaRMSNorm"),
        ("model.norm", {"kind": "ternary"}, "kind of model.norm is 'ternary', and it is a LlamaRMSNorm"),
        (EMBEDDING, {"kind": "ternary", "state": "trainable"}, f"state of {EMBEDDING} is 'trainable', and it is an"),
        (EMBEDDING, {"kind": "int8", "layout": "2bit"}, f"modules has .'layout'. for {EMBEDDING}"),
        (UP, {"kind": "int8"}, f"the checkpoint has no {UP}.weight"),
    ],
)
def test_a_config_that_does_not_fit(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "2bit", "tied")
    checkpoint.modules[name] = fields
    checkpoint.write()
    with pytest.raises(FileError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_layout_that_does_not_exist_for_an_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "2bit", "tied")
    config = LlamaConfig(**{**SIZES, "hidden_size": 64, "head_dim": 16})
    config.quantization_config = {
        **json.loads((checkpoint.directory / "config.json").read_text())["quantization_config"],
        "modules": {EMBEDDING: KINDS["1.6bit"]},
    }
    with pytest.raises(FileError, match=f"{EMBEDDING}: layout is 1.6bit, which does not exist for 64"):
        LlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_names_that_a_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "int8", "tied")
    checkpoint.modules |= {"model.visual": {"kind": "int8"}, "model.layers.7.mlp.up_proj": {"kind": "ternary"}}
    checkpoint.write()
    assert logits(checkpoint.load()).isfinite().all()
