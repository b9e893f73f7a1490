"""Converted checkpoints under transformers: the logits of the source, generation, adapters, saving, --verify."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import bitnet

import bitlayers.transformers  # makes "bitlab" known to from_pretrained
from bitcore.exceptions import FileError
from bitcore.ops.packing import unpack_weights
from bitlab.cli import main
from bitlayers import BitLinear, Int8Linear
from bitlayers import convert as take_over
from bitmodels.checkpoints import convert_checkpoint
from bitmodels.verification import verify
from checkpoints import (
    ENCODERS,
    TinyModel,
    as_floats,
    as_packed,
    gguf_file,
    hugging_face,
    packed_rows,
    read_tensors,
    tiny,
)

pytestmark = pytest.mark.medium  # Importing transformers takes seconds.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

DIVIDES = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
MULTIPLIES = {**DIVIDES, "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**MULTIPLIES, "quantization_mode": "online"}
IDS = (torch.arange(48) * 37 % 96).view(2, 24)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers' own ternary layers compile parts of themselves."""
    with torch.compiler.set_stance("force_eager"):
        yield


def load(directory: Path) -> Any:
    kind: Any = AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
    return y


def converted(source: Path, **options: Any) -> Any:
    convert_checkpoint(source, source.with_name("target"), **options)
    return load(source.with_name("target"))


def linears(model: nn.Module) -> dict[str, BitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


@pytest.mark.parametrize("quantization", [DIVIDES, MULTIPLIES, ONLINE], ids=["divides", "multiplies", "masters"])
@pytest.mark.parametrize("kind", ["llama", "bitnet", "qwen3"])
def test_it_is_what_transformers_loads_and_bitlayers_takes_over(kind: str, quantization: Any, tmp_path: Path) -> None:
    """Two ways to the same model, the same bits."""
    model = tiny(kind, scales="tensor", tied=kind == "qwen3")
    tensors = as_floats(model) if quantization is ONLINE else as_packed(model, quantization is DIVIDES)
    source = hugging_face(tmp_path / "source", model, tensors, quantization)
    theirs = take_over(load(source))
    if quantization is ONLINE:
        bitlayers.deploy(theirs)
    ours = converted(source, head="keep")
    assert linears(ours).keys() == linears(theirs).keys()
    for name, layer in linears(theirs).items():
        assert torch.equal(linears(ours)[name].qweight, layer.qweight)  # type: ignore[arg-type]
        assert torch.equal(linears(ours)[name].qweight_scale, layer.qweight_scale)  # type: ignore[arg-type]
    assert torch.equal(logits(ours), logits(theirs))


# --- against a float model --------------------------------------------------------------------------------------------


class Float(nn.Module):
    """Codes times scales, and activations rounded to int8 by their largest magnitude, in float64."""

    def __init__(self, weight: Tensor, group: int, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.group, self.bias = weight, min(group, weight.shape[1]), bias

    def codes_and_steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.double().split(self.group, dim=-1)
        steps = torch.cat([(p.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127).expand_as(p) for p in groups], -1)
        return torch.round(x.double() / steps), steps

    def forward(self, x: Tensor) -> Tensor:
        codes, steps = self.codes_and_steps(x)
        y = codes * steps @ self.weight.double().T
        return (y if self.bias is None else y + self.bias.double()).float()


def assert_computes(model: Any, source: TinyModel, group: int) -> None:
    """Every ternary layer, and the logits, against a float model: equal but for codes within rounding of a tie.

    Layer by layer on the same inputs, where a code that differs is counted; after it, all that follows differs, too.
    """
    floats = {
        name: Float(torch.from_numpy(source.weight(name)), group, layer.bias)
        for name, layer in linears(model).items()
        if name in source.codes
    }
    seen: list[tuple[int, int]] = []

    def compare(name: str, x: Tensor, y: Tensor) -> None:
        own, exact = floats[name], x.double() / floats[name].codes_and_steps(x)[1]
        ties = (exact - exact.floor() - 0.5).abs() < 1e-4
        narrow = torch.round(x / own.codes_and_steps(x)[1].float())  # As a float32 computes it.
        differing = narrow != torch.round(exact)
        assert not (differing & ~ties).any()
        seen.append((int(differing.sum()), differing.numel()))
        same = ~differing.any(-1)
        torch.testing.assert_close(y[same], own(x)[same], atol=1e-5 * float(y.std()), rtol=1e-5)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: compare(name, x[0], y))
        for name in floats
    ]
    y = logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(floats) == 14
    assert sum(count for count, _ in seen) < sum(total for _, total in seen) / 1000
    for name, layer in floats.items():
        model.set_submodule(name, layer)
    expected = logits(model)
    assert float((y - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("layout", ["2bit", "1.6bit"])
@pytest.mark.parametrize("kind", ["llama", "bitnet", "qwen3"])
def test_packed_rows_against_a_float_model(kind: str, layout: Any, tmp_path: Path) -> None:
    model = tiny(kind, scales="tensor", hidden=120, inner=200)
    source = hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES)
    ours = converted(source, layout=layout, head="keep")
    model.scales = {name: 1 / (1 / scale.astype(np.float32)) for name, scale in model.scales.items()}
    assert_computes(ours, model, 1 << 20)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_floats_per_group_against_a_float_model(group: int, tmp_path: Path) -> None:
    """Definition with float activations: int8 codes with a scale per group."""
    model = tiny("qwen3", group, ternary_embedding=True, tied=True, hidden=256, inner=320)
    ours = converted(hugging_face(tmp_path / "source", model, as_floats(model)))
    embedding = torch.from_numpy(model.weight("model.embed_tokens"))
    assert torch.equal(ours.get_input_embeddings()(IDS), embedding[IDS])
    assert ours.get_output_embeddings().qweight is ours.get_input_embeddings().qweight
    del model.codes["model.embed_tokens"]
    assert_computes(ours, model, group)


@pytest.mark.parametrize(
    ("architecture", "encoding"), [("llama", "Q2_0 of 128"), ("qwen3", "Q2_0 of 64"), ("llama", "I2_S")]
)
def test_gguf_against_a_float_model(architecture: str, encoding: str, tmp_path: Path) -> None:
    """Rows that the writer permuted are in transformers' order again, or the rotation would turn other pairs."""
    group = ENCODERS[encoding][1]
    model = tiny(architecture, group, "tensor" if encoding == "I2_S" else "group", hidden=256, inner=512)
    source = gguf_file(tmp_path / "a.gguf", model, encoding, architecture, permutes=architecture == "llama")
    ours = converted(source, head="keep")
    floats = hugging_face(tmp_path / "floats", model, as_floats(model))
    reference = load(floats)
    names = set(linears(ours))
    assert_computes(ours, model, group if encoding != "I2_S" else 1 << 20)
    for name in names:
        weight = reference.get_submodule(name).weight
        assert torch.equal(ours.get_submodule(name).weight, weight)
    ours.config.rms_norm_eps = reference.config.rms_norm_eps
    assert float((logits(ours) - logits(reference)).norm() / logits(reference).norm()) < 0.05


class HandWrittenMiniCPM(nn.Module):
    """MiniCPM's three multipliers, on the parts of a Llama."""

    def __init__(self, llama: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.llama, self.config = llama, config

    def forward(self, ids: Tensor) -> Tensor:
        model, config = self.llama.model, self.config
        depth = config["scale_depth"] / config["num_hidden_layers"] ** 0.5
        h = model.embed_tokens(ids) * config["scale_emb"]
        positions = torch.arange(ids.shape[1])[None]
        rotation = model.rotary_emb(h, positions)
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for layer in model.layers:
            attended, _ = layer.self_attn(layer.input_layernorm(h), position_embeddings=rotation, attention_mask=mask)
            h = h + attended * depth
            h = h + layer.mlp(layer.post_attention_layernorm(h)) * depth
        hidden = model.norm(h) / (config["hidden_size"] / config["dim_model_base"])
        y: Tensor = self.llama.lm_head(hidden)
        return y


def test_minicpm_against_a_hand_written_one(tmp_path: Path) -> None:
    model = tiny("minicpm", 64)
    ours = converted(hugging_face(tmp_path / "source", model, as_floats(model)), head="keep").dequantize()
    as_llama = TinyModel({**model.config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}, model.group)
    as_llama.codes, as_llama.scales, as_llama.floats = model.codes, model.scales, model.floats
    theirs = HandWrittenMiniCPM(load(hugging_face(tmp_path / "llama", as_llama, as_floats(model))), model.config).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), theirs(IDS), atol=1e-4, rtol=1e-4)


# --- what users do with it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", [False, True], ids=["int8 head", "ternary embedding"])
def test_generate_adapt_and_save_again(tied: bool, embedding: bool, tmp_path: Path) -> None:
    model = tiny("qwen3", 64, ternary_embedding=embedding, tied=tied)
    ours = converted(hugging_face(tmp_path / "source", model, as_floats(model)))
    assert isinstance(ours.get_output_embeddings(), BitLinear if embedding else Int8Linear)
    generated = ours.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, 29)
    ours.save_pretrained(tmp_path / "again")
    first, second = (read_tensors(tmp_path / name / "model.safetensors") for name in ("target", "again"))
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype, name
        assert values.tobytes() == second[name].tobytes(), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("target", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0].items() <= configs[1].items()
    assert torch.equal(logits(load(tmp_path / "again")), logits(ours))

    adapted = get_peft_model(ours, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW((each for each in adapted.parameters() if each.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_bfloat16_is_the_dtype_that_the_config_says(tmp_path: Path) -> None:
    model = tiny("bitnet", scales="tensor", torch_dtype="bfloat16")
    source = hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES)
    convert_checkpoint(source, tmp_path / "target")
    kind: Any = AutoModelForCausalLM
    ours = kind.from_pretrained(tmp_path / "target")
    assert ours.dtype == torch.bfloat16
    assert ours(IDS).logits.dtype == torch.bfloat16


# --- --verify ---------------------------------------------------------------------------------------------------------


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES)
    assert main(["convert", str(source), str(tmp_path / "target"), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "verified: logits differ from transformers' by" in printed
    assert "the int8 head changes a logit by" in printed
    assert main(["convert", str(source), str(tmp_path / "wrong"), "--scales", "multiply", "--verify"]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("kind", ["bitnet", "qwen3"])
def test_verify_masters_and_ternary_floats(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, 64, hidden=256, inner=512, tied=True)
    source = hugging_face(tmp_path / "source", model, as_floats(model), ONLINE if kind == "bitnet" else None)
    lines: list[str] = []
    convert_checkpoint(source, tmp_path / "target", check=lambda directory: lines.extend(verify(source, directory)))
    assert [line.split()[0] for line in lines] == ["verified:"]


def test_what_transformers_does_not_load_is_said(tmp_path: Path) -> None:
    model = tiny("minicpm", 64)
    source = hugging_face(tmp_path / "source", model, as_floats(model))
    convert_checkpoint(source, tmp_path / "target")
    assert verify(source, tmp_path / "target") == ["not verified: transformers has no class MiniCPMForCausalLM"]
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert verify(tmp_path / "a.gguf", tmp_path / "target") == [
        "not verified: transformers does not load these types of GGUF"
    ]


def test_a_model_that_computes_something_else_is_noticed(tmp_path: Path) -> None:
    model, other = tiny("llama", 64, seed=0), tiny("llama", 64, seed=1)
    first = hugging_face(tmp_path / "source", model, as_floats(model))
    second = hugging_face(tmp_path / "other", other, as_floats(other))
    convert_checkpoint(second, tmp_path / "target")
    with pytest.raises(FileError, match="the converted model's logits differ from those of transformers by"):
        verify(first, tmp_path / "target")


def test_codes_are_those_of_the_source(tmp_path: Path) -> None:
    model = tiny("llama", 128)
    for name, layer in linears(converted(hugging_face(tmp_path / "source", model, as_floats(model)))).items():
        assert layer.qweight is not None
        found = unpack_weights(layer.qweight, layer.in_features).numpy()
        np.testing.assert_array_equal(found, model.codes[name])


# --- checkpoints that transformers wrote ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 1), (8, 33), (12, 7), (128, 130)])
def test_packed_rows_are_those_of_transformers(shape: tuple[int, int]) -> None:
    codes = torch.randint(-1, 2, shape)
    theirs = bitnet.pack_weights(codes.clone()).numpy()
    np.testing.assert_array_equal(theirs, packed_rows(codes.numpy().astype(np.int8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "BitNetConfig"])
def test_what_transformers_saved(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its class, its config.json, its shards."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = getattr(transformers, kind)(
        **sizes, num_key_value_heads=2, vocab_size=97, head_dim=18, rope_parameters=rope, quantization_config=ONLINE
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert (tmp_path / "source/model.safetensors.index.json").is_file()
    ours = converted(tmp_path / "source", head="keep")
    theirs: Any = bitlayers.deploy(take_over(load(tmp_path / "source")))
    assert torch.equal(logits(ours), logits(theirs))
    apart = ("quantization_config", "transformers_version", "dtype", "_name_or_path")
    found, expected = (
        {name: value for name, value in each.config.to_dict().items() if name not in apart} for each in (ours, theirs)
    )
    assert found == expected
    assert str(dtype).endswith(json.loads((tmp_path / "target/config.json").read_text())["dtype"])
