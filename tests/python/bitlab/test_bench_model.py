"""`bitlab bench DIRECTORY`: every figure is there and makes sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitlab.cli import main
from bitmodels.checkpoints import convert_checkpoint
from checkpoints import as_floats, hugging_face, tiny

pytestmark = pytest.mark.medium  # The limits are measured.


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", 64, max_position_embeddings=1024)
    convert_checkpoint(hugging_face(tmp_path / "source", model, as_floats(model)), tmp_path / "model")
    options = ["--threads", "1,2", "--turns", "1", "--output", str(tmp_path / "out")]
    assert main(["bench", str(tmp_path / "model"), *options]) == 0
    printed = capsys.readouterr().out
    for line in ("read bandwidth", "generation at context 128", "prompt of 512", "first token after 128"):
        assert line in printed
    record = json.loads((tmp_path / "out/model.json").read_text())
    assert [each["threads"] for each in record["results"]] == [1, 2]
    for each in record["results"]:
        assert each["ternary_operations"] == 2 * 2 * 128 * (2 * 128 + 2 * 64 + 3 * 256)
        for name in ("read", "peak", "prompt", "first_token", "generation"):
            assert len(each[name]) == 1
            assert each[name][0] > 0
