"""The safetensors package reads what the engine writes, and the other way round; what one refuses both do."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import ROOT

COPY = ROOT / "build" / "tests" / "cpp" / "copy_safetensors"
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64),
]


def copy(source: Path, target: Path) -> str:
    """Reads and writes by the engine. Returns what it complains about."""
    done = subprocess.run([COPY, source, target], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def some_tensors() -> dict[str, Tensor]:
    generator = np.random.default_rng(7)
    tensors: dict[str, Tensor] = {}
    for index, dtype in enumerate(DTYPES):
        for shape in ((), (0, 3), (1,), (5,), (16, 32), (3, 1, 7)):
            most = 2 if dtype == torch.bool else 256
            raw = torch.from_numpy(generator.integers(0, most, math.prod(shape) * dtype.itemsize, dtype=np.uint8))
            tensors[f"{index}.{shape}"] = (
                raw.view(dtype).reshape(shape) if len(raw) else torch.zeros(shape, dtype=dtype)
            )
    return tensors


def test_every_dtype_goes_both_ways(tmp_path: Path) -> None:
    tensors = some_tensors()
    metadata = {"format": "pt", 'quote"': "line\nbreak", "é": ""}
    save_file(tensors, tmp_path / "python", metadata)
    assert copy(tmp_path / "python", tmp_path / "engine") == ""
    found = load_file(tmp_path / "engine")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(found[name]) == bytes_of(tensor), name
    with safe_open(tmp_path / "engine", "pt") as file:
        assert file.metadata() == metadata
    # Once in the engine's order it stays.
    assert copy(tmp_path / "engine", tmp_path / "again") == ""
    assert (tmp_path / "again").read_bytes() == (tmp_path / "engine").read_bytes()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "python")
    assert copy(tmp_path / "python", tmp_path / "engine") == ""
    assert load_file(tmp_path / "engine") == {}


def test_the_data_and_whole_cache_lines_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(16), "c": torch.zeros(1, dtype=torch.uint8), "d": torch.zeros(32)}
    save_file(tensors, tmp_path / "python")
    assert copy(tmp_path / "python", tmp_path / "engine") == ""
    content = (tmp_path / "engine").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(content[8 : 8 + length]).items()}
    assert offsets == {"b": [0, 64], "d": [64, 192], "a": [192, 204], "c": [204, 205]}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        ({"a": entry("U8", [4], 0, 4)}, 8),
        ({"a": entry("U8", [4], 0, 4)}, 3),
        ({"a": entry("U8", [4], 2, 6)}, 6),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [2], 5, 7)}, 7),
        ({"a": entry("F32", [4], 0, 4)}, 4),
        ({"a": entry("F4", [3], 0, 2)}, 2),
        ({"a": entry("U8", [-1], 0, 1)}, 1),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1),
        ({"__metadata__": {"a": 1}}, 0),
        ([], 0),
    ],
    ids=str,
)
def test_what_the_package_refuses_the_engine_refuses(header: object, data_bytes: int, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "file")
    assert str(tmp_path / "file") in copy(tmp_path / "file", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
