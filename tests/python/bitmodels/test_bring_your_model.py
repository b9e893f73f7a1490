"""Every command of the page "Bring your model" runs, on tiny checkpoints of the names that it uses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bitlab.cli import main
from checkpoints import as_packed, gguf_file, hugging_face, tiny
from support import ROOT

pytestmark = pytest.mark.medium  # --verify imports transformers.

PAGE = (ROOT / "docs/guides/bring-your-model.md").read_text()
DIVIDES = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
MULTIPLIES = {**DIVIDES, "linear_class": "autobitlinear"}
BYTES = [f"<{byte}>" for byte in range(90)]


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def vocabulary(pre: str) -> dict[str, Any]:
    metadata = {"model": "gpt2", "pre": pre, "tokens": [*BYTES, "a", "b", "ab"], "merges": ["a b"]}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def make_sources(folder: Path) -> None:
    """What the page's user has."""
    bitnet, llama = tiny("bitnet", scales="tensor", tied=True), tiny("llama", scales="tensor")
    bonsai = tiny("qwen3", 128, ternary_embedding=True, tied=True, hidden=256)
    hugging_face(folder / "bitnet-b1.58-2B-4T", bitnet, as_packed(bitnet, False), MULTIPLIES)
    for name in ("Falcon-E-1B", "Llama3-8B-1.58"):
        directory = hugging_face(folder / name, llama, as_packed(llama, True), DIVIDES)
        tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": []}
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    hugging_face(folder / "packed-without-a-word", llama, as_packed(llama, True))
    gguf_file(folder / "Ternary-Bonsai-1.7B.gguf", bonsai, "Q2_0 of 128", "qwen3", **vocabulary("qwen2"))
    gguf_file(folder / "unknown-split.gguf", bonsai, "PQ2_0", "qwen3", **vocabulary("nobody knows"))
    gguf_file(folder / "bitnet.gguf", tiny("bitnet", 128, "tensor"), "I2_S", "bitnet")


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert len(lines) > 8
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "bitlab", line
        assert main(arguments) == 0, f"{line}: {capsys.readouterr().err}"
        if arguments[0] == "convert":
            assert (tmp_path / arguments[2] / "model.safetensors").is_file()
    assert (tmp_path / "bonsai/tokenizer.json").is_file()
    assert (tmp_path / "other/tokenizer.json").read_text() == (tmp_path / "Falcon-E-1B/tokenizer.json").read_text()


@pytest.mark.parametrize("option", ["--tokenizer", "--scales", "--hidden-act"])
def test_what_cannot_be_told_is_refused_without_the_option(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    (line,) = (line for line in commands() if option in line)
    _, *arguments = shlex.split(line.split(option)[0])
    assert main(arguments) == 1
    assert option in capsys.readouterr().err
