"""A shared object that is missing, damaged, or of another platform: one line at import, and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitcore import _library

pytestmark = pytest.mark.medium

LOAD_EACH = """
import json
import sys
from pathlib import Path
from bitcore import _library

for name in sys.argv[1:]:
    _library.PATH = Path(name)
    try:
        _library.load()
    except ImportError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps("loaded"))
"""
IMPORT_FROM_PATH = """
import sys

# An editable installation of the tree finds its packages before the path is looked at.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
import bitcore
bitcore.prepare_weights
"""
WITHOUT_TORCH = """
import importlib
import sys

sys.modules["torch"] = None  # as if it were not installed
for name in sys.argv[1:]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        print(getattr(found, attribute) if attribute else "imported")
    except (ImportError, AttributeError) as error:
        print(error)
"""


def run_python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A new interpreter, which may come to grief without us. `path` comes before everything installed."""
    environment = {**os.environ, "PYTHONPATH": str(path or Path(_library.__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def load_each(files: list[Path]) -> list[str]:
    done = run_python("-c", LOAD_EACH, *map(str, files))
    assert done.returncode == 0, f"ended with {done.returncode} after\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_each(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def changed(original: bytes, offset: int, value: int) -> bytes:
    return original[:offset] + bytes([value]) + original[offset + 1 :]


def test_the_operators_come_with_torch_whoever_has_looked_for_it() -> None:
    """transformers asks for torch's spec before anybody imports it."""
    asked = "import bitcore, importlib.util; importlib.util.find_spec('torch'); importlib.util.find_spec('torch')"
    used = "import sys, torch; print(torch.ops.bitcore.bitlinear, *(type(each).__name__ for each in sys.meta_path))"
    done = run_python("-c", f"{asked}; {used}")
    assert done.stdout.startswith("bitcore.bitlinear"), done.stderr
    assert "_Finder" not in done.stdout


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = _library.PATH.read_bytes()
    lengths = [64, 100, 500, 4096, *(len(whole) * part // 8 for part in range(1, 7))]
    files = write_each(tmp_path, {f"{length}.so": whole[:length] for length in lengths})
    for file, message in zip(files, load_each(files), strict=True):
        assert message == f"bitcore's torch operators are truncated ({file}): run `make clean build`"


@pytest.mark.parametrize("size", [0, 5, 63])
def test_no_header(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = write_each(tmp_path, {"file.so": _library.PATH.read_bytes()[:size]})
    monkeypatch.setattr(_library, "PATH", file)
    with pytest.raises(ImportError, match=r"are truncated \(.*file\.so\): run `make clean build`$"):
        _library.load()


def test_of_another_platform(tmp_path: Path) -> None:
    whole = _library.PATH.read_bytes()
    contents = {
        "text.so": b"no shared object at all " * 1000,
        "macos.so": b"\xcf\xfa\xed\xfe" + whole[4:],
        "32bit.so": changed(whole, 4, 1),
        "big_endian.so": changed(whole, 5, 2),
        "machine.so": changed(whole, 18, 243),
    }
    files = write_each(tmp_path, contents)
    for file, message in zip(files, load_each(files), strict=True):
        start = f"bitcore's torch operators do not fit this system or torch {torch.__version__} ({file}: "
        assert message.startswith(start)
        assert message.endswith("): run `make clean build`")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
def test_what_this_torch_does_not_have(tmp_path: Path) -> None:
    source, file = tmp_path / "later.cc", tmp_path / "later.so"
    source.write_text('extern "C" void torch_of_the_future();\nvoid call() { torch_of_the_future(); }\n')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(file)], check=True, timeout=600)
    (message,) = load_each([file])
    assert message == (
        f"bitcore's torch operators do not fit this system or torch {torch.__version__} "
        f"({file}: undefined symbol: torch_of_the_future): run `make clean build`"
    )


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("1.13.1", False),
        ("2.9.1+cpu", False),
        ("2.10.0a0+git", True),
        ("2.10.0", True),
        ("2.100.0", True),
        ("3.0", True),
    ],
)
def test_versions_of_torch(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if fits:
        _library.load()  # Once more does no harm.
        return
    with pytest.raises(ImportError) as caught:
        _library.load()
    assert str(caught.value) == (f"bitcore needs torch 2.10 or later, this is torch {version}: install a later one")


@pytest.mark.parametrize("content", [None, b"", "truncated"])
def test_importing_a_package_without_a_sound_shared_object(content: bytes | str | None, tmp_path: Path) -> None:
    """Away from the tree there is no Makefile."""
    shutil.copytree(
        Path(_library.__file__).parent, tmp_path / "bitcore", ignore=shutil.ignore_patterns("lib", "__pycache__")
    )
    if content is not None:
        (tmp_path / "bitcore" / "lib").mkdir()
        cut = _library.PATH.read_bytes()[:100_000]
        (tmp_path / "bitcore" / "lib" / _library.PATH.name).write_bytes(cut if isinstance(content, str) else content)
    done = run_python("-c", IMPORT_FROM_PATH, path=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    fault = "have not been built" if content is None else "are truncated"
    file = tmp_path / "bitcore" / "lib" / _library.PATH.name
    remedy = "pip install scikit-build-core && pip install --no-build-isolation ."
    assert last == f"ImportError: bitcore's torch operators {fault} ({file}): in BitLab's source folder run `{remedy}`"


def test_without_torch() -> None:
    """What needs it says what to install; the rest is there."""
    needing = ["bitcore:prepare_weights", "bitcore.ops.bitlinear", "bitcore.kernels", "bitlayers"]
    needing += ["bitmodels:AutoBitModel", "bitmodels:BitMLPModel"]
    done = run_python("-c", WITHOUT_TORCH, *needing)
    message = 'bitcore needs torch, which is not installed: run `pip install "bitlab[torch]"`'
    assert done.stdout.splitlines() == [message] * len(needing)
    done = run_python("-c", WITHOUT_TORCH, "bitcore", "bitcore.exceptions", "bitmodels.checkpoints", "bitcore:nothing")
    assert done.stdout.splitlines() == ["imported"] * 3 + ["module 'bitcore' has no attribute 'nothing'"]
