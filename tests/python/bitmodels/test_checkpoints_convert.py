"""bitlab convert: every encoding becomes the same codes and scales, bit for bit, or one line that says why not."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import oracle
from bitcore.exceptions import FileError, QuantizationError
from bitlab.cli import main
from bitmodels import LanguageModel
from bitmodels.checkpoints import conversion as conversion_module
from bitmodels.checkpoints import convert_checkpoint
from bitmodels.checkpoints.conversion import Conversion
from checkpoints import (
    ENCODERS,
    Array,
    TinyModel,
    as_floats,
    as_packed,
    gguf_file,
    gguf_metadata,
    gguf_name,
    gguf_tensors,
    hugging_face,
    packed_rows,
    read_tensors,
    tiny,
    unpack,
)
from gguf_bytes import gguf_bytes
from support import ROOT

DIVIDES = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
MULTIPLIES = {**DIVIDES, "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**DIVIDES, "linear_class": "autobitlinear", "quantization_mode": "online"}
Q = "model.layers.0.self_attn.q_proj"


class Result:
    """A converted directory, read without any code of the converter."""

    def __init__(self, path: Path) -> None:
        self.config = json.loads((path / "config.json").read_text())
        self.quantization = self.config["quantization_config"]
        self.tensors = read_tensors(path / "model.safetensors")

    def fields(self, name: str) -> dict[str, Any]:
        return {**self.quantization, **self.quantization["modules"].get(name, {})}

    def codes(self, name: str, columns: int) -> Array:
        return unpack(self.tensors[f"{name}.qweight"], columns)

    def weight(self, name: str, columns: int) -> Array:
        """float32: codes times their scales."""
        scale = self.tensors[f"{name}.qweight_scale"]
        fields = self.fields(name)
        if fields["weight_granularity"] == "per_group":
            assert scale.dtype == np.float16
            scale = scale.repeat(fields["group_size"], axis=1)[:, :columns]
        elif fields["weight_granularity"] == "per_channel":
            scale = scale[:, None]
        return self.codes(name, columns) * scale.astype(np.float32)


def convert(source: Path, **options: Any) -> tuple[Result, Conversion]:
    target = source.with_name("target")
    shutil.rmtree(target, ignore_errors=True)
    found = convert_checkpoint(source, target, **options)
    return Result(target), found


def assert_same_model(result: Result, model: TinyModel, renamed: dict[str, str] | None = None) -> None:
    """Weights to the bit, floats unchanged, nothing more and nothing less."""
    names = set()
    for name, codes in model.codes.items():
        np.testing.assert_array_equal(result.codes(name, codes.shape[1]), codes, err_msg=name)
        np.testing.assert_array_equal(result.weight(name, codes.shape[1]), model.weight(name), err_msg=name)
        names |= {f"{name}.qweight", f"{name}.qweight_scale"}
    for stored, values in model.floats.items():
        name = stored
        for theirs, ours in (renamed or {}).items():
            name = name.replace(theirs, ours)
        if f"{name}_scale" in result.tensors:
            assert_int8(result, name, values)
            names.add(f"{name}_scale")
        else:
            np.testing.assert_array_equal(result.tensors[name], values, err_msg=name)
        names.add(name)
    assert set(result.tensors) - names == {f"{Q}.weight"}  # The guard, which stops readers that do not know qweight.
    assert result.tensors[f"{Q}.weight"].shape == (0,)
    assert result.tensors[f"{Q}.weight"].dtype == np.uint8


def assert_int8(result: Result, name: str, values: Array) -> None:
    scale = np.abs(values).max(1) / np.float32(127)
    np.testing.assert_array_equal(result.tensors[f"{name}_scale"], scale)
    np.testing.assert_array_equal(result.tensors[name], np.rint(values / scale[:, None]).astype(np.int8))


def test_what_an_int8_head_changes_is_reported(tmp_path: Path) -> None:
    model = tiny("llama", scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, divides=True), DIVIDES)
    _, found = convert(source)
    kept = convert_checkpoint(source, tmp_path / "kept", head="keep")
    assert kept.head_change is None
    change = found.head_change
    assert change is not None
    assert change.tokens == 16
    tokens = [(37 * i + 11) % 96 for i in range(16)]
    exact, logits = (LanguageModel.open(each.target).logits(tokens) for each in (kept, found))
    assert change.largest == pytest.approx(np.abs(exact - logits).max(), rel=1e-3)
    assert change.deviation == pytest.approx(logits.std(), rel=1e-6)
    assert 0 < change.largest < change.deviation / 10
    assert f"the int8 head changes a logit by {change.largest:.2g} at most" in str(change)


@pytest.mark.parametrize("kind", ["bitnet", "minicpm"])
def test_what_a_tied_int8_head_changes_is_little(kind: str, tmp_path: Path) -> None:
    """MiniCPM's logits are scaled: comparing with others would show a large difference."""
    model = tiny(kind, scales="tensor", tied=True)
    _, found = convert(hugging_face(tmp_path / "source", model, as_packed(model, divides=True), DIVIDES))
    change = found.head_change
    assert change is not None
    assert 0 < change.largest < change.deviation / 10


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["2bit", "1.6bit"])
@pytest.mark.parametrize("quantization", [DIVIDES, MULTIPLIES], ids=["divides", "multiplies"])
@pytest.mark.parametrize("kind", ["llama", "bitnet", "qwen3"])
def test_packed_rows(kind: str, quantization: Any, layout: str, tmp_path: Path) -> None:
    model = tiny(kind, scales="tensor", tied=kind == "bitnet")
    tensors = as_packed(model, divides=quantization is DIVIDES)
    result, found = convert(hugging_face(tmp_path / "source", model, tensors, quantization), layout=layout)
    for name in model.codes:
        stored = tensors[f"{name}.weight_scale"]
        expected = np.float32(1) / stored if quantization is DIVIDES else stored
        model.scales[name] = expected.reshape(1, 1).repeat(len(model.scales[name]), 0)
        model.group = 1 << 20
    assert_same_model(result, model)
    assert {result.fields(name)["layout"] for name in model.codes} == {layout}
    assert result.quantization["activation_granularity"] == "per_channel"
    assert result.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert result.config["architectures"] == model.config["architectures"]
    assert found.bytes_after == (tmp_path / "target/model.safetensors").stat().st_size
    assert found.notes == []


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_rows_that_four_does_not_divide(rows: int, tmp_path: Path) -> None:
    """transformers' own loader fails at them."""
    model = tiny(scales="tensor", inner=rows, hidden=32)
    result, _ = convert(hugging_face(tmp_path / "source", model, as_packed(model, False), MULTIPLIES))
    assert_same_model(result, model)


def test_a_bias_is_multiplied_where_transformers_multiplies_it(tmp_path: Path) -> None:
    model = tiny(scales="tensor", attention_bias=True)
    biases = {
        f"{name}.bias": np.linspace(-1, 1, len(codes), dtype=np.float32)
        for name, codes in model.codes.items()
        if "self_attn" in name
    }
    for quantization in (MULTIPLIES, DIVIDES):
        model.floats |= biases
        source = hugging_face(
            tmp_path / f"{len(quantization)}", model, as_packed(model, quantization is DIVIDES), quantization
        )
        result, _ = convert(source)
        for name, bias in biases.items():
            scale = result.tensors[name.replace("bias", "qweight_scale")] if quantization is MULTIPLIES else 1
            np.testing.assert_array_equal(result.tensors[name], bias * np.float32(scale))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["bitnet", "1bitllm"])
def test_masters_are_quantized_by_the_mean_of_their_magnitudes(kind: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(kind)
    rng = np.random.default_rng(1)
    masters = {name: rng.standard_normal(codes.shape).astype(dtype) for name, codes in model.codes.items()}
    tensors = {f"{name}.weight": weight for name, weight in masters.items()}
    result, _ = convert(hugging_face(tmp_path / "source", model, tensors, ONLINE if kind == "bitnet" else None))
    schema = oracle.Schema("per_tensor", "int8", "per_channel")
    for name, weight in masters.items():
        wide = weight.astype(np.float32)
        scale = oracle.weight_scale(wide, schema)
        assert result.tensors[f"{name}.qweight_scale"] == scale
        codes = oracle.quantize_weight(wide, scale, schema)
        np.testing.assert_array_equal(result.codes(name, weight.shape[1]), codes)
    assert result.config["architectures"] == ["BitNetForCausalLM"]
    assert result.config["hidden_act"] == ("relu2" if kind == "bitnet" else "silu")
    assert "model.layers.1.mlp.ffn_sub_norm.weight" in result.tensors


def test_modules_that_stay_float(tmp_path: Path) -> None:
    model = tiny("bitnet")
    tensors = {
        name: np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)
        for name, w in as_floats(model).items()
    }
    quantization = {**ONLINE, "modules_to_not_convert": ["lm_head", "o_proj", "model.layers.1.mlp"]}
    result, found = convert(hugging_face(tmp_path / "source", model, tensors, quantization), head="keep")
    floats = {part.name for part in found.parts if part.kind == "float" and len(part.shape) == 2}
    assert {name.rpartition(".")[2] for name in floats} == {
        "embed_tokens",
        "lm_head",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    for name in floats - {"model.embed_tokens", "lm_head"}:
        assert result.quantization["modules"][name] == {"kind": "float"}
        np.testing.assert_array_equal(result.tensors[f"{name}.weight"], tensors[f"{name}.weight"])
    assert "lm_head" not in result.quantization["modules"]


@pytest.mark.parametrize(
    ("group", "scales", "granularity", "size"),
    [
        (32, "group", "per_group", 32),
        (64, "group", "per_group", 64),
        (128, "group", "per_group", 128),
        (256, "group", "per_group", 256),
        (1 << 20, "group", "per_channel", 128),
        (128, "tensor", "per_tensor", 128),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_that_are_ternary_already(
    group: int, scales: str, granularity: str, size: int, dtype: str, tmp_path: Path
) -> None:
    model = tiny("qwen3", group, scales, ternary_embedding=True, tied=True, hidden=288, inner=264)
    result, _ = convert(hugging_face(tmp_path / "source", model, as_floats(model, dtype)))
    assert_same_model(result, model)
    assert result.quantization["weight_granularity"] == granularity
    assert result.quantization["group_size"] == size
    assert result.quantization["activation_granularity"] == (
        "per_group" if granularity == "per_group" else "per_channel"
    )
    assert result.quantization["modules"]["lm_head"] == result.quantization["modules"]["model.embed_tokens"]
    assert result.quantization["modules"]["lm_head"] == {"kind": "ternary"}


def test_bfloat16_that_is_ternary_already(tmp_path: Path) -> None:
    """NumPy has no bfloat16, so that the file is written by hand."""
    model = tiny("llama", 128, ternary_embedding=True, hidden=256)
    for name, values in as_floats(model).items():
        groups = oracle.round_to(values, "bfloat16").reshape(len(values), -1, 128)
        model.scales[name.removesuffix(".weight")] = np.abs(groups).max(2)
    model.floats = {name: oracle.round_to(values, "bfloat16") for name, values in model.floats.items()}
    header, body = {}, b""
    for name, values in {**model.floats, **as_floats(model)}.items():
        content = oracle.float32_to_bfloat16_bits(values).tobytes()
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    source = hugging_face(tmp_path / "source", model, {})
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    result, found = convert(source)
    assert_same_model(result, model)
    assert found.notes == []
    assert b'"model.norm.weight":{"dtype":"BF16"' in (tmp_path / "target/model.safetensors").read_bytes()


def test_scales_that_float16_rounds_are_counted(tmp_path: Path) -> None:
    model = tiny("llama", 128, hidden=256)
    model.scales[Q] = model.scales[Q].astype(np.float32) * np.float32(1.0001)
    result, found = convert(hugging_face(tmp_path / "source", model, as_floats(model)))
    np.testing.assert_array_equal(result.tensors[f"{Q}.qweight_scale"], model.scales[Q].astype(np.float16))
    assert found.notes == ["512 scales are no float16 and were rounded, by 0.0001 of their value at most"]
    model.scales[Q][3, 0] = 70000
    with pytest.raises(FileError, match=f"{Q}.weight: the scale 70000 of a group lies outside of float16"):
        convert(hugging_face(tmp_path / "b", model, as_floats(model)))


def test_groups_of_zeros(tmp_path: Path) -> None:
    model = tiny("llama", 128, hidden=256)
    model.codes[Q][5, :128] = 0
    result, found = convert(hugging_face(tmp_path / "source", model, as_floats(model)))
    model.scales[Q][5, 0] = 2.0**-14
    assert_same_model(result, model)
    assert found.notes == ["1 scales are 0: their codes became 0, and the scales 2^-14"]


def test_minicpm_becomes_granite(tmp_path: Path) -> None:
    model = tiny("minicpm", 64)
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    model.config |= {"rope_scaling": longrope, "original_max_position_embeddings": 32}
    result, _ = convert(hugging_face(tmp_path / "source", model, as_floats(model)))
    assert_same_model(result, model)
    config = result.config
    assert (config["architectures"], config["model_type"]) == (["GraniteForCausalLM"], "granite")
    assert config["embedding_multiplier"] == 12
    assert config["residual_multiplier"] == 1.4 / 2**0.5
    assert config["logits_scaling"] == 128 / 64
    assert config["attention_multiplier"] == 1 / 32**0.5
    assert config["rope_parameters"] == {**longrope, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


def test_1bitllm_has_the_norms_of_bitnet(tmp_path: Path) -> None:
    model = tiny("1bitllm", scales="tensor")
    result, _ = convert(hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES))
    for name, values in model.floats.items():
        own = name.replace("inner_attn_ln", "attn_sub_norm").replace("ffn_layernorm", "ffn_sub_norm")
        if own != "lm_head.weight":
            np.testing.assert_array_equal(result.tensors[own], values)


def test_both_dialects_of_rope(tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    old = tiny("qwen3", rope_theta=1e6, rope_scaling={"type": "yarn", **yarn})
    new = tiny("qwen3", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **yarn})
    del new.config["rope_theta"]
    for name, model in (("old", old), ("new", new)):
        result, _ = convert(hugging_face(tmp_path / name, model, as_floats(model)))
        assert result.config["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 1e6, **yarn}


def test_shards(tmp_path: Path) -> None:
    model = tiny(scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES)
    whole, _ = convert(source)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    sharded, _ = convert(source)
    assert {name: values.tobytes() for name, values in sharded.tensors.items()} == {
        name: values.tobytes() for name, values in whole.tensors.items()
    }


def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    model = tiny("bitnet", scales="tensor", tied=True)
    embedding = model.floats["model.embed_tokens.weight"]
    tensors = as_packed(model, False)
    result, _ = convert(
        hugging_face(tmp_path / "a", model, {**tensors, "lm_head.weight": embedding.copy()}, MULTIPLIES)
    )
    assert_same_model(result, model)
    with pytest.raises(FileError, match=r"lm_head.weight is not the embedding, which it is tied to"):
        convert(hugging_face(tmp_path / "b", model, {**tensors, "lm_head.weight": embedding + 1}, MULTIPLIES))


def test_the_files_beside_the_weights(tmp_path: Path) -> None:
    model = tiny(scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, True), DIVIDES)
    tokenizer = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 95}}, "added_tokens": []})
    texts = {"tokenizer.json": tokenizer, "tokenizer_config.json": "{}", "chat_template.jinja": "{{ ü }}"}
    texts |= {"generation_config.json": '{"eos_token_id": [1, 2]}'}
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("theirs")
    convert(source)
    target = tmp_path / "target"
    assert {path.name for path in target.iterdir()} == {*texts, "config.json", "model.safetensors"}
    for name, text in texts.items():
        assert (target / name).read_text() == text
    (source / "tokenizer.json").write_text(tokenizer.replace("95", "96"))
    with pytest.raises(FileError, match=r"tokenizer.json: has 97 tokens, and the model's vocab_size is 96"):
        convert(source)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FileError, match=r"other: has no tokenizer.json"):
        convert(source, tokenizer=other)
    (other / "tokenizer.json").write_text(tokenizer)
    convert(source, tokenizer=other)
    assert (target / "tokenizer.json").read_text() == tokenizer


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bitnet-b1.58"])
def test_gguf(architecture: str, encoding: str, tmp_path: Path) -> None:
    kind = "bitnet" if architecture.startswith("bitnet") else architecture
    _, group, _ = ENCODERS[encoding]
    scales = "tensor" if encoding == "I2_S" else "group"
    model = tiny(kind, group, scales, hidden=256, inner=512, ternary_embedding=encoding != "I2_S")
    source = gguf_file(tmp_path / "a.gguf", model, encoding, architecture, permutes=architecture == "llama")
    result, found = convert(source, layout="1.6bit")
    assert_same_model(result, model)
    granularity = "per_tensor" if scales == "tensor" else "per_group" if group < 256 else "per_channel"
    assert result.fields(Q)["weight_granularity"] == granularity
    assert result.config["hidden_act"] == ("relu2" if kind == "bitnet" else "silu")
    assert result.config["architectures"] == model.config["architectures"]
    assert result.config["rms_norm_eps"] == 1e-5
    assert result.config["head_dim"] == 64
    assert (found.container, found.notes) == ("GGUF 3", [])


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "F16", "BF16", "F32"])
def test_embedding_and_head_in_what_the_gguf_package_quantizes(kind: str, tmp_path: Path) -> None:
    model = tiny("qwen3", 256, hidden=256)
    tensors = gguf_tensors(model, "TQ2_0", permutes=False)
    number, expected = gguf.GGMLQuantizationType[kind], {}
    for name in ("model.embed_tokens", "lm_head"):
        values = model.floats[f"{name}.weight"]
        if kind == "Q6_K":  # The package reads it, but cannot write it: any bytes are blocks of it.
            content = np.random.default_rng(0).integers(0, 256, (96, 210), np.uint8)
            content[:, 208:] = np.full((96, 1), 0.01, np.float16).view(np.uint8)
        else:
            content = gguf.quants.quantize(values, number)
        expected[name] = gguf.quants.dequantize(content, number).astype(np.float32).reshape(values.shape)
        tensors[gguf_name(f"{name}.weight")] = (values.shape, int(number), content.tobytes())
    source = tmp_path / "a.gguf"
    source.write_bytes(gguf_bytes(tensors, gguf_metadata(model, "qwen3")))
    result, _ = convert(source)
    assert_int8(result, "lm_head.weight", expected["lm_head"])
    stored = result.tensors["model.embed_tokens.weight"]
    assert stored.dtype == (np.float32 if kind in ("F32", "BF16") else np.float16)
    np.testing.assert_array_equal(stored, expected["model.embed_tokens"].astype(stored.dtype))
    assert result.quantization["modules"]["lm_head"] == {"kind": "int8"}


def test_the_tq2_0_of_the_gguf_package(tmp_path: Path) -> None:
    model = tiny("llama", 256, hidden=256, inner=512, ternary_embedding=True)
    for name, codes in model.codes.items():
        theirs = gguf.quants.quantize(model.weight(name), gguf.GGMLQuantizationType.TQ2_0)
        assert theirs.tobytes() == ENCODERS["TQ2_0"][2](codes, model.scales[name])
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in gguf_metadata(model, "llama").items():
        if key != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, (shape, kind, content) in gguf_tensors(model, "TQ2_0", permutes=True).items():
        raw = np.frombuffer(content, np.uint8).reshape(shape[0], -1) if kind else np.frombuffer(content, np.float32)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_model(convert(tmp_path / "a.gguf")[0], model)


def test_scales_that_are_zero_or_negative_in_gguf(tmp_path: Path) -> None:
    model = tiny("qwen3", 128)
    scales, codes = model.scales[Q], model.codes[Q]
    scales[0, 0], codes[0, :128] = 0, 2  # Code 3 where the scale is 0 does not count.
    scales[1, 0] = -scales[1, 0]
    source = gguf_file(tmp_path / "a.gguf", model, "Q2_0 of 128", "qwen3")
    result, found = convert(source)
    scales[0, 0], codes[0, :128] = 2.0**-14, 0
    scales[1, 0], codes[1, :128] = -scales[1, 0], -codes[1, :128]
    assert_same_model(result, model)
    assert found.notes == [
        "1 scales are 0: their codes became 0, and the scales 2^-14",
        "1 scales are negative: they became positive, and their codes changed sign",
    ]


def test_rope_in_gguf(tmp_path: Path) -> None:
    model = tiny("llama", 128)
    original = "llama.rope.scaling.original_context_length"
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, original: 16}
    result, _ = convert(gguf_file(tmp_path / "a.gguf", model, "PQ2_0", "llama", True, **yarn))
    assert result.config["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16
    }  # fmt: skip
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    waves = 2 * np.pi * 10000.0 ** (np.arange(16) / 16)
    smooth = np.clip((8192 / waves - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    tensors = gguf_tensors(model, "PQ2_0", permutes=True)
    tensors["rope_freqs.weight"] = ((16,), 0, divisors.tobytes())
    (tmp_path / "b.gguf").write_bytes(gguf_bytes(tensors, gguf_metadata(model, "llama")))
    result, _ = convert(tmp_path / "b.gguf")
    expected = {**llama3, "rope_theta": 10000.0, "original_max_position_embeddings": 8192}
    assert result.config["rope_parameters"] == expected
    tensors["rope_freqs.weight"] = ((16,), 0, (divisors * 2).tobytes())
    (tmp_path / "b.gguf").write_bytes(gguf_bytes(tensors, gguf_metadata(model, "llama")))
    with pytest.raises(FileError, match=r"rope_freqs.weight has divisors of frequencies that no known scaling has"):
        convert(tmp_path / "b.gguf")


def test_minicpm_in_gguf(tmp_path: Path) -> None:
    model = tiny("minicpm", 128)
    keys = {"embedding_scale": 12.0, "residual_scale": 0.989949, "logit_scale": 2.0}
    metadata = {f"minicpm.{key}": value for key, value in keys.items()}
    result, _ = convert(gguf_file(tmp_path / "a.gguf", model, "PQ2_0", "minicpm", True, **metadata))
    assert_same_model(result, model)
    assert result.config["model_type"] == "granite"
    assert result.config["residual_multiplier"] == 0.989949
    with pytest.raises(FileError, match=r"minicpm.embedding_scale is None, expected a positive number"):
        convert(gguf_file(tmp_path / "b.gguf", model, "PQ2_0", "minicpm", True))


def test_a_bitnet_that_does_not_say_its_activation(tmp_path: Path) -> None:
    model = tiny("bitnet", 128, "tensor")
    source = gguf_file(tmp_path / "a.gguf", model, "I2_S", "bitnet")
    with pytest.raises(FileError, match=r"give bitlab convert --hidden-act silu or relu2"):
        convert(source)
    assert convert(source, hidden_act="relu2")[0].config["hidden_act"] == "relu2"


# --- what is refused --------------------------------------------------------------------------------------------------


def broken(model: TinyModel, tensors: dict[str, Array], what: str) -> None:
    """Changes one thing of a packed checkpoint."""
    weight, scale = f"{Q}.weight", f"{Q}.weight_scale"
    if what == "missing":
        del tensors[weight]
    elif what == "missing norm":
        del model.floats["model.norm.weight"]
    elif what == "extra":
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(32, np.float32)
    elif what == "misshapen":
        tensors[weight] = tensors[weight][:-1].copy()
    elif what == "code 3":
        tensors[weight][2, 3:5] |= 3
    elif what == "no scale":
        del tensors[scale]
    elif what == "two scales":
        tensors[scale] = np.ones(2, np.float32)
    else:
        tensors[scale] = np.array([float(what)], np.float32)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", rf"has no tensor {Q}.weight, which the model needs"),
        ("missing norm", r"has no tensor model.norm.weight"),
        ("extra", r"has a tensor model.layers.0.self_attn.q_norm.weight, which LlamaForCausalLM has not"),
        ("misshapen", rf"{Q}.weight has shape \(31, 128\), expected \(32, 128\)"),
        ("code 3", rf"{Q}.weight: 2 codes 3, expected 0, 1 and 2"),
        ("no scale", rf"{Q}.weight is uint8, which is not read here"),
        ("two scales", rf"{Q}.weight_scale has shape \(2,\), expected one element"),
        ("nan", r"weight_scale: 1 elements are NaN or infinite"),
        ("inf", r"weight_scale: 1 elements are NaN or infinite"),
        ("0", r"weight_scale is 0, and weights are divided by it"),
    ],
)
def test_damaged_tensors(what: str, message: str, tmp_path: Path) -> None:
    model = tiny(scales="tensor")
    tensors = as_packed(model, divides=True)
    broken(model, tensors, what)
    refused(hugging_face(tmp_path / "source", model, tensors, DIVIDES), message)


def refused(source: Path, message: str, **options: Any) -> None:
    """One line, and nothing is left of the target."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(FileError, match=message) as error:
        convert_checkpoint(source, source.with_name("target"), **options)
    assert "\n" not in str(error.value)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "the architecture is GemmaForCausalLM; known are LlamaForCausalLM"),
        (
            {"architectures": ["MiniCPM3ForCausalLM"]},
            "MiniCPM3ForCausalLM: its attention is multi-head latent attention",
        ),
        ({"architectures": ["MixtralForCausalLM"]}, "it has experts"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh', expected one of silu"),
        ({"hidden_size": "128"}, "hidden_size is '128', expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"vocab_size": None}, "vocab_size is None, expected a positive integer"),
        ({"vocab_size": 95}, r"model.embed_tokens.weight has shape \(96, 128\), expected \(95, 128\)"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"head_dim": 3}, "head_dim is 3, expected an even number"),
        ({"sliding_window": 4096}, "sliding_window is 4096, expected full attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic' .it changes with the length"),
        ({"rope_scaling": {"type": "mystery"}}, "rope_type is 'mystery', known are default"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_parameters of type linear lack \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, r"rope_parameters have \['x'\]"),
        ({"rope_scaling": 3}, "rope_parameters are 3, expected an object"),
        ({"rope_scaling": {"type": ["x"]}}, r"rope_type is \['x'\]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a positive number"),
        ({"rope_theta": "abc"}, "rope_theta is 'abc', expected a positive number"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60, expected a positive number"),
        ({"max_position_embeddings": 2**30}, "max_position_embeddings is 1073741824, expected at most 16777216"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and there are"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"eos_token_id": "a"}, "eos_token_id is 'a', expected a token, or several"),
        (
            {"quantization_config": {**DIVIDES, "modules_to_not_convert": "lm_head"}},
            "modules_to_not_convert is 'lm_head'",
        ),
        ({"quantization_config": {**DIVIDES, "linear_class": ["x"]}}, r"linear_class is \['x'\], expected a text"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is given"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected \"bitnet\""),
        ({"quantization_config": {"quant_method": "bitlab"}}, "is in BitLab's own form already"),
        ({"quantization_config": {**DIVIDES, "use_rms_norm": True}}, "use_rms_norm is true"),
        ({"quantization_config": {**DIVIDES, "linear_class": "x"}}, "give bitlab convert --scales multiply or divide"),
        ({"quantization_config": None}, "give bitlab convert --scales multiply or divide"),
    ],
)
def test_configs(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny(scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, divides=True), DIVIDES)
    fields = {**json.loads((source / "config.json").read_text()), **config}
    (source / "config.json").write_text(json.dumps(fields))
    refused(source, message)


def test_a_convention_that_config_json_does_not_say_can_be_given(tmp_path: Path) -> None:
    model = tiny(scales="tensor")
    source = hugging_face(tmp_path / "source", model, as_packed(model, divides=False))
    result, _ = convert(source, scales="multiply")
    assert_same_model(result, model)


def test_floats_without_a_rule(tmp_path: Path) -> None:
    model = tiny()
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(codes.shape).astype(np.float32) for name, codes in model.codes.items()
    }
    refused(
        hugging_face(tmp_path / "source", model, tensors), "no linear layer is ternary, and config.json names no rule"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight", "lm_head.weight"])
def test_floats_that_are_not_finite(name: str, value: float, tmp_path: Path) -> None:
    model = tiny("bitnet")
    tensors = {**model.floats, **as_floats(model)}
    tensors[name] = tensors[name].copy()
    tensors[name].flat[7] = value
    refused(hugging_face(tmp_path / "source", model, tensors, ONLINE), name)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.architecture": "qwen35"}, {}, "the architecture is qwen35: its layers are Gated DeltaNets"),
        ({"prism.hadamard.size": 128}, {}, r"rotated basis \(prism.hadamard.size\)"),
        ({"split.count": 3}, {}, "is one of 3 files"),
        ({"qwen3.attention.sliding_window": 128}, {}, "sliding_window is 128"),
        ({"qwen3.rope.dimension_count": 16}, {}, "16 of 32 dimensions are rotated"),
        ({"qwen3.rope.scaling.type": "x"}, {}, "rope.scaling.type is 'x'"),
        ({"qwen3.block_count": 3}, {}, "has no tensor model.layers.2.self_attn.q_proj.weight"),
        ({"qwen3.rope.freq_base": "500"}, {}, "qwen3.rope.freq_base is '500', expected a positive number"),
        ({"qwen3.block_count": 10**9}, {}, "num_hidden_layers is 1000000000, and there are"),
        ({}, {"blk.0.attn_q.scale": ((1,), 1, bytes(2))}, "is a scale beside the scales"),
        ({"qwen3.embedding_length": "x"}, {}, "qwen3.embedding_length is 'x', expected a positive number"),
        ({}, {"blk.0.attn_q.weight": ((128, 128), 2, bytes(72 * 128))}, "blk.0.attn_q.weight is Q4_0"),
        ({}, {"blk.0.attn_q.weight": ((128, 256), 34, bytes(54 * 128))}, "blk.0.attn_q.weight is TQ1_0"),
        ({}, {"blk.0.new.weight": ((4,), 0, bytes(16))}, "has a tensor blk.0.new.weight"),
        ({}, {"blk.0.attn_q.scale": ((1,), 0, bytes(4))}, "is a scale beside the scales"),
    ],
)
def test_gguf_files(metadata: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny("qwen3", 128)
    content = {**gguf_tensors(model, "PQ2_0", permutes=False), **tensors}
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes(content, {**gguf_metadata(model, "qwen3"), **metadata}))
    refused(path, message)


def test_codes_and_scales_in_gguf(tmp_path: Path) -> None:
    model = tiny("qwen3", 128)
    model.codes[Q][3, :5] = 2
    refused(gguf_file(tmp_path / "a.gguf", model, "PQ2_0", "qwen3"), "blk.0.attn_q.weight: 5 codes 3")
    model = tiny("qwen3", 128)
    model.scales[Q][3, 0] = np.nan
    refused(gguf_file(tmp_path / "b.gguf", model, "PQ2_0", "qwen3"), "1 of 128 scales are NaN or infinite")


@pytest.mark.parametrize("argument", ["layout", "head", "scales", "hidden_act"])
def test_arguments(argument: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {argument: "x"}
    with pytest.raises(QuantizationError, match=f"{argument} is 'x', expected"):
        convert_checkpoint(tmp_path, tmp_path / "target", **options)


def packed_source(path: Path) -> Path:
    model = tiny(scales="tensor")
    return hugging_face(path, model, as_packed(model, divides=True), DIVIDES)


def test_a_target_that_exists(tmp_path: Path) -> None:
    source, target = packed_source(tmp_path / "source"), tmp_path / "target"
    for make in (target.mkdir, lambda: target.write_text("mine"), lambda: target.symlink_to("nowhere")):
        make()
        refused(source, r"target: exists already, expected a name that is free")
        target.rmdir() if target.is_dir() else target.unlink()
    with pytest.raises(FileNotFoundError, match=r"no/target: there is no directory .*/no to make it in"):
        convert_checkpoint(source, tmp_path / "no" / "target")
    with pytest.raises(FileError, match="neither a directory of Hugging Face nor a GGUF file"):
        convert_checkpoint(source / "config.json", target)
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / "missing", target)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packed_source(tmp_path / "source")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("posix_fallocate", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left on device"):
                convert_checkpoint(source, tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    source = packed_source(tmp_path / "source")

    def interrupted(done: int, total: int, name: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", progress=interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), 15)

    monkeypatch.setattr(conversion_module, "_sync", stop)
    assert main(["convert", str(source), str(tmp_path / "target")]) == 130
    assert "target was not written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_check_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, seen = packed_source(tmp_path / "source"), []

    def check(directory: Path) -> None:
        seen.extend(sorted(path.name for path in directory.iterdir()))
        raise FileError("no")

    with pytest.raises(FileError, match="no"):
        convert_checkpoint(source, tmp_path / "target", check=check)
    assert seen == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- the file, the command --------------------------------------------------------------------------------------------


def test_data_begin_on_cache_lines(tmp_path: Path) -> None:
    convert(packed_source(tmp_path / "source"))
    content = (tmp_path / "target/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert (8 + length) % 64 == 0
    places = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
    assert all(begin % 64 == 0 for begin, end in places if (end - begin) % 64 == 0)
    assert sorted(places)[0][0] == 0
    assert max(places)[1] == len(content) - 8 - length


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = packed_source(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "target"), "--layout", "1.6bit"]) == 0
    printed = capsys.readouterr().out
    assert "ternary 1.6bit," in printed
    assert "LlamaForCausalLM" in printed
    assert "int8, scale per" in printed
    assert main(["convert", str(source), str(tmp_path / "target")]) == 1
    assert capsys.readouterr().err.endswith("target: exists already, expected a name that is free\n")
    assert main(["inspect", str(source)]) == 0
    assert "bitlab convert makes a LlamaForCausalLM" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "target")]) == 0
    assert "saved by BitLab" in capsys.readouterr().out


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
from bitlab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_needs_no_torch(tmp_path: Path) -> None:
    source = packed_source(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "convert", str(source), str(tmp_path / "target")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Result(tmp_path / "target").tensors[f"{Q}.qweight"].dtype == np.uint8


def test_the_packed_rows_of_this_test_are_those_of_the_format() -> None:
    codes = np.array([[-1], [0], [1], [1], [-1]], np.int8)  # Rows 0 and 1 hold rows 0, 2, 4 and rows 1, 3.
    assert packed_rows(codes)[:, 0].tolist() == [0 | 2 << 2 | 0 << 4, 1 | 2 << 2]


@pytest.mark.parametrize("form", ["packed", "masters", "ternary"])
def test_models_of_random_weights(form: str, tmp_path: Path) -> None:
    """What benchmarks/models/make_model.py makes has the form that it says."""
    made = runpy.run_path(str(ROOT / "benchmarks/models/make_model.py"))
    shape = made["Shape"]("qwen3", 32, 128, 192, 2, 4, 2, 32, 100, tie_word_embeddings=form != "ternary")
    made["make"](shape, form, tmp_path / "source")
    result, found = convert(tmp_path / "source")
    assert {part.kind for part in found.parts if "layers" in part.name and len(part.shape) == 2} == {"ternary"}
    assert result.quantization["weight_granularity"] == ("per_group" if form == "ternary" else "per_tensor")
    assert found.parameters == sum(part.parameters for part in found.parts)
