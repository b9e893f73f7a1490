"""bitlab inspect: containers and encodings of others, counted, and refused in one line where they are damaged."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from bitcore.exceptions import FileError
from bitlab.cli import main
from bitmodels.checkpoints import Report, inspect_checkpoint
from gguf_bytes import gguf_bytes, i2_s, ptq1_0, q2_0

ROWS, COLUMNS = 6, 512


def ternary(groups: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Codes, one float16 scale for each of `groups` columns, and their product."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (ROWS, COLUMNS)).astype(np.int8)
    codes[:, ::groups] = 1  # A group without a nonzero weight has no scale.
    scales = rng.uniform(0.01, 2, (ROWS, COLUMNS // groups)).astype(np.float16)
    return codes, scales, codes * scales.repeat(groups, 1).astype(np.float32)


def shares(codes: Any) -> tuple[float, float, float]:
    a, b, c = (float((codes == value).mean()) for value in (-1, 0, 1))
    return a, b, c


def only_codes(report: Report) -> Any:
    (group,) = (group for group in report.groups if group.codes is not None)
    return group.codes


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


ENCODERS: dict[str, tuple[int, int, Callable[[Any, Any], bytes]]] = {
    "Q2_0 of 64": (42, 64, lambda codes, scales: q2_0(codes, scales, 64)),
    "Q2_0 of 128": (42, 128, lambda codes, scales: q2_0(codes, scales, 128)),
    "PQ2_0": (142, 128, lambda codes, scales: q2_0(codes, scales, 128)),
    "PTQ1_0": (143, 128, ptq1_0),
}


@pytest.mark.parametrize("encoding", ENCODERS)
def test_encodings_that_the_gguf_package_lacks(encoding: str, tmp_path: Path) -> None:
    kind, size, encode = ENCODERS[encoding]
    codes, scales, _ = ternary(size)
    content = gguf_bytes({"a.weight": ((ROWS, COLUMNS), kind, encode(codes, scales)), "n": ((4,), 0, bytes(16))})
    report = inspect_checkpoint(written(tmp_path / "a.gguf", content))
    assert [group.kind for group in report.groups] == [encoding, "float32"]
    found = only_codes(report)
    assert found.counts.sum() == codes.size
    assert found.shares == pytest.approx(shares(codes))
    assert (found.smallest_scale, found.largest_scale) == (scales.min(), scales.max())
    assert (report.architecture, report.scales) == ("qwen3", "multiply")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.TQ1_0, gguf.GGMLQuantizationType.TQ2_0])
def test_what_the_gguf_package_quantized(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    codes, scales, weights = ternary(256)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([b"a", b"\xff", b"c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = inspect_checkpoint(tmp_path / "a.gguf")
    found = only_codes(report)
    assert found.shares == pytest.approx(shares(codes))
    assert (found.smallest_scale, found.largest_scale) == (scales.min(), scales.max())
    assert report.tokenizer == "gpt2, split as llama-bpe: 3 tokens, within the model's 4"
    assert {group.kind for group in report.groups} == {kind.name, "float16"}


def test_i2_s(tmp_path: Path) -> None:
    codes, _, _ = ternary(128)
    content = gguf_bytes({"a": ((ROWS, COLUMNS), 36, i2_s(codes, 0.5))}, {"general.architecture": "bitnet-b1.58"})
    report = inspect_checkpoint(written(tmp_path / "a.gguf", content))
    assert only_codes(report).shares == pytest.approx(shares(codes))
    assert only_codes(report).largest_scale == 0.5
    assert any("its scales are wrong" in note for note in report.notes)


def test_scales_that_are_zero_or_negative_and_codes_that_are_none(tmp_path: Path) -> None:
    codes, scales, _ = ternary(128)
    scales[0, 0], scales[1, 0], scales[2, 0] = 0, -1, np.nan
    codes[0, :128] = 2  # Whose scale is 0: they do not count.
    codes[3, :5] = 2
    report = inspect_checkpoint(
        written(tmp_path / "a.gguf", gguf_bytes({"a": ((ROWS, COLUMNS), 142, q2_0(codes, scales, 128))}))
    )
    found = only_codes(report)
    assert (found.zero_scales, found.negative_scales, found.other_scales, found.invalid) == (1, 1, 1, 5)
    assert "PQ2_0: 5 codes 3, which are no ternary weights" in report.notes
    assert "PQ2_0: 1 scales are NaN or infinite" in report.notes
    assert "PQ2_0: 1 scales are 0 and 1 negative" in report.notes


def test_a_vocabulary_without_tensors(tmp_path: Path) -> None:
    report = inspect_checkpoint(written(tmp_path / "a.gguf", gguf_bytes({})))
    assert report.groups == []
    assert any("has no tensor token_embd.weight" in note for note in report.notes)


def test_a_rotated_basis_is_named(tmp_path: Path) -> None:
    content = gguf_bytes({"a": ((4,), 0, bytes(16))}, {"prism.hadamard.size": "128"})
    assert any(
        "prism.hadamard.size" in note for note in inspect_checkpoint(written(tmp_path / "a.gguf", content)).notes
    )


WEIGHT = ((2, 128), 142, bytes(68))
FLOATS = ((4,), 0, bytes(16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUX" + bytes(40), "neither a directory nor a file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "the number of tensors is 1099511627776, more than"),
        (gguf_bytes({"a": ((4,), 7777, bytes(16))}), "a has type 7777, which is not known"),
        (gguf_bytes({"a": ((4,), 38, bytes(16))}), "type 38: TL1 of bitnet.cpp, whose tiles"),
        (gguf_bytes({"a": ((2, 100), 142, bytes(68))}), r"in blocks of 128, and has the shape \(2, 100\)"),
        (gguf_bytes({"a": ((2, 128), 142, bytes(60))}), "a ends at byte .* truncated"),
        (gguf_bytes({"a": ((8, 128), 42, bytes(500))}), "type 42 have room for neither Q2_0 of 64 nor Q2_0 of 128"),
        (gguf_bytes({"a": ((1, 128), 42, bytes(36))}), "Q2_0 of 64 and Q2_0 of 128: which one cannot be told"),
        (gguf_bytes({"a": FLOATS, "b": ((64,), 0, bytes(32))}), "b ends at byte"),
        (gguf_bytes({"a": ((64,), 0, bytes(32)), "b": ((64,), 0, bytes(256))}), "b begins at byte .* inside of a"),
        (gguf_bytes({"a": ((2**40, 2**40), 0, bytes(16))}), "sizes .*, which no file can hold"),
        (gguf_bytes({"a": ((0, 4), 0, b"")}), "sizes .*, which no file can hold"),
        (gguf_bytes({"a": ((1, 1, 1, 1, 4), 0, bytes(16))}), "a has 5 dimensions, expected 1 to 4"),
        (gguf_bytes({"a": FLOATS}, {"general.alignment": "32"}), "general.alignment is '32', expected a power"),
    ],
)
def test_damaged_gguf_files(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message) as error:
        inspect_checkpoint(written(tmp_path / "a.gguf", content))
    assert "\n" not in str(error.value)


def small_gguf() -> bytes:
    codes, scales, _ = ternary(128)
    return gguf_bytes({"a": ((ROWS, COLUMNS), 42, q2_0(codes, scales, 128)), "b": FLOATS}, {"name": "x"})


def expect_answer_or_file_error(path: Path) -> bool:
    message = None
    try:
        inspect_checkpoint(path)
    except FileError as error:
        message = str(error)
    assert message is None or message.startswith(f"{path}: ")
    return message is None


def test_every_truncation_of_a_gguf_file_is_noticed(tmp_path: Path) -> None:
    content = small_gguf()
    needed = len(content) - 16  # The last tensor is padded.
    for size in [*range(260), *range(260, needed, 97), needed - 1]:
        assert not expect_answer_or_file_error(written(tmp_path / "a.gguf", content[:size])), size


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_of_a_gguf_header_never_crash(seed: int, tmp_path: Path) -> None:
    rng, content = random.Random(seed), small_gguf()
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4, 200)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        expect_answer_or_file_error(written(tmp_path / "a.gguf", bytes(damaged)))


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def packed(codes: Any) -> Any:
    """Row r of R packed rows holds rows r, R + r, 2 R + r and 3 R + r."""
    parts = (codes.astype(np.uint8) + 1).reshape(4, -1, codes.shape[1])
    return (parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6).astype(np.uint8)


BITNET = {"quant_method": "bitnet"}


def directory(path: Path, quantization: dict[str, Any] | None, tensors: dict[str, Any], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    fields = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10, **config}
    if quantization is not None:
        fields["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("quantization", "scales", "note"),
    [
        (BITNET, "divide", "num_attention_heads is None"),
        ({**BITNET, "linear_class": "autobitlinear"}, "multiply", "num_attention_heads is None"),
        ({**BITNET, "use_rms_norm": True}, "divide", "norms of their own"),
        (None, "NOT KNOWN", "num_attention_heads is None"),
        ({**BITNET, "linear_class": "other"}, "NOT KNOWN", "num_attention_heads is None"),
    ],
)
def test_packed_rows_of_transformers(quantization: Any, scales: str, note: str, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (8, 33)).astype(np.int8)
    tensors = {
        "q.weight": packed(codes),
        "q.weight_scale": np.full(1, 20, np.float32),
        "n.weight": np.ones(33, np.float32),
    }
    report = inspect_checkpoint(directory(tmp_path / "a", quantization, tensors))
    assert only_codes(report).shares == pytest.approx(shares(codes))
    assert only_codes(report).largest_scale == 20
    assert report.architecture == "LlamaForCausalLM"
    assert report.scales.startswith(scales)
    assert any(note in line for line in report.notes)
    assert {group.parameters for group in report.groups} == {codes.size, 34}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("group", "found"), [(32, "group of 32"), (128, "group of 128"), (512, "row")])
def test_floats_that_are_ternary_already(group: int, found: str, dtype: Any, tmp_path: Path) -> None:
    _, _, weights = ternary(group)
    report = inspect_checkpoint(directory(tmp_path / "a", None, {"q.weight": weights.astype(dtype)}))
    assert report.groups[0].kind.endswith(f"ternary already, one magnitude per {found}")
    weights[0, :2] = 0.3, 0.7
    report = inspect_checkpoint(directory(tmp_path / "b", None, {"q.weight": weights.astype(dtype)}))
    assert report.groups[0].kind == np.dtype(dtype).name


@pytest.mark.parametrize("layout", ["2bit", "1.6bit"])
def test_our_own_directory(layout: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bitcore import pack_weights

    codes = np.random.default_rng(0).integers(-1, 2, (21, 70)).astype(np.int8)
    qweight = pack_weights(torch.from_numpy(codes), layout).numpy()
    tensors = {"q.qweight": qweight, "q.qweight_scale": np.full(1, 0.5, np.float32), "q.weight": np.zeros(0, np.uint8)}
    report = inspect_checkpoint(directory(tmp_path / "a", {"quant_method": "bitlab"}, tensors))
    assert only_codes(report).shares == pytest.approx(shares(codes))
    assert [group.parameters for group in report.groups] == [codes.size, 1]
    trailer = qweight.size - -(-64 // 21) * 21
    for place, value in ((0, 0), (12, 9), (24, 91), (24, 3)):  # the magic number, the layout, in_features
        damaged = qweight.copy()
        damaged.reshape(-1)[trailer + place] = value
        path = directory(tmp_path / "b", {"quant_method": "bitlab"}, {**tensors, "q.qweight": damaged})
        with pytest.raises(FileError, match="q.qweight is no packed weight: its trailer is damaged"):
            inspect_checkpoint(path)


def test_the_tokenizer(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", None, {"n": np.ones(3, np.float32)})
    tokenizer: dict[str, Any] = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 8}}, "added_tokens": [{"id": 9}]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspect_checkpoint(path).tokenizer == "BPE: 10 tokens, within the model's 10"
    tokenizer["added_tokens"] = [{"id": 10}]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspect_checkpoint(path).tokenizer == "BPE: 11 tokens, MORE than the model's 10"
    for damaged in ("{", "[]", "{}", '{"model": {"vocab": {"a": "0"}}}'):
        (path / "tokenizer.json").write_text(damaged)
        with pytest.raises(FileError, match="tokenizer.json"):
            inspect_checkpoint(path)


def sharded(path: Path, **places: str) -> Path:
    path.mkdir()
    save_file({"a": np.ones(3, np.float32)}, path / "1.safetensors")
    save_file({"b": np.ones((2, 2), np.float32) * 3, "c": np.ones(3, np.float32)}, path / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"} | places
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards(tmp_path: Path) -> None:
    report = inspect_checkpoint(sharded(tmp_path / "a"))
    assert sum(group.tensors for group in report.groups) == 3
    assert report.architecture == "not named (config.json)"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../1.safetensors"}, r"names the file '\.\./1.safetensors'"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": "3.safetensors"}, "names 3.safetensors, which is not there"),
        ({"d": "1.safetensors"}, "promises d, and the file has nothing besides"),
        ({"c": "1.safetensors"}, "promises c, and the file has nothing besides"),
    ],
)
def test_an_index_that_does_not_fit(places: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        inspect_checkpoint(sharded(tmp_path / "a", **places))


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = sharded(tmp_path / "deep" / "a")
    outside = tmp_path / "outside.safetensors"
    (path / "1.safetensors").rename(outside)
    (path / "1.safetensors").symlink_to(outside)
    with pytest.raises(FileError, match="link out of the directory"):
        inspect_checkpoint(path)


def test_a_download_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    path = sharded(tmp_path / "snapshots" / "a")
    (path / "1.safetensors").rename(tmp_path / "blobs" / "0123")
    (path / "1.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    assert sum(group.tensors for group in inspect_checkpoint(path).groups) == 3


def with_header(header: Any, body: bytes = bytes(16)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + body


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1234", "has 4 bytes, expected at least 8"),
        (struct.pack("<Q", 1 << 60) + b"{}", "the header has 1152921504606846976 bytes, and the file 10"),
        (with_header(b"{"), "the header is no JSON"),
        (with_header(b"[" * 100_000), "the header is no JSON"),
        (with_header([]), "the header is a list"),
        (with_header({"a": 1}), "the header says of a: 1"),
        (with_header({"a": entry(0, 8, shape="2")}), "the header says of a"),
        (with_header({"a": entry(0, 8, shape=(-2,))}), "the header says of a"),
        (with_header({"a": entry(8, 0)}), "the header says of a"),
        (with_header({"a": entry(0, 8, dtype="F4")}), "a has dtype 'F4', known are"),
        (with_header({"a": {**entry(0, 8), "dtype": ["F32"]}}), r"a has dtype \['F32'\]"),
        (with_header({"a": entry(0, 12)}), "a has 12 bytes, expected 8"),
        (with_header({"a": entry(12, 20)}), "a ends at byte 20, and the file at 16"),
        (with_header({"a": entry(0, 8), "b": entry(4, 12)}), "b begins at byte 4, inside of a"),
        (with_header(b'{"a": 1, "a": 2}'), r"\['a'\] stands there twice"),
    ],
)
def test_damaged_safetensors_files(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        inspect_checkpoint(written(tmp_path / "a.safetensors", content))


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="neither model.safetensors nor"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="but pytorch_model.bin: pickled weights are not read"):
        inspect_checkpoint(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.gguf", small_gguf())
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("GGUF 3", "qwen3", "Q2_0 of 128", "3,072", "2.12", "multiply"):
        assert expected in printed
    assert main(["inspect", str(tmp_path / "b.gguf")]) == 1
    assert "b.gguf" in capsys.readouterr().err
    assert main(["inspect", str(written(path, b"GGUF"))]) == 1
    assert capsys.readouterr().err.startswith(f"bitlab: {path}: ")
