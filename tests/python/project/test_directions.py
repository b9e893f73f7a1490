"""No arrow points up: which folder includes, and which package imports, what stands before it and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support import ROOT

# Each uses only itself and what stands before it.
PACKAGES = ("bitcore", "bitlayers", "bitmodels", "bitlab")
FOLDERS = ("base", "io", "packing", "quantize", "kernels", "linear")

# The public headers, by the folder that defines what they declare.
PUBLIC = {
    "bitcore/bitcore.h": "linear",
    "bitcore/config.h": "base",
    "bitcore/exceptions.h": "base",
    "bitcore/executor.h": "base",
    "bitcore/io.h": "io",
    "bitcore/kernels/base.h": "kernels",
    "bitcore/kernels/registry.h": "kernels",
    "bitcore/ops/base.h": "quantize",
    "bitcore/ops/bitlinear.h": "linear",
    "bitcore/ops/packing.h": "packing",
    "bitcore/tensor.h": "base",
    "bitcore/version.h": "base",
}

# Includes that point up today. Each is to go; none may come.
KNOWN = {
    ("include/bitcore/kernels/base.h", "bitcore/ops/bitlinear.h"),
    ("src/bitcore/base/cpu_features.cc", "bitcore/kernels/registry.h"),
    ("src/bitcore/packing/packing.cc", "bitcore/quantize/row_functions.h"),
    ("src/bitcore/quantize/quantize-inl.h", "bitcore/kernels/tile_functions.h"),
}


def included(text: str) -> list[str]:
    return re.findall(r'^#include "(bitcore/[^"]+)"', text, re.MULTILINE)


def folder_of(header: str) -> str:
    return PUBLIC.get(header) or header.split("/")[1]


def upward_includes(folder: str, text: str) -> list[str]:
    rank = FOLDERS.index(folder)
    return [header for header in included(text) if FOLDERS.index(folder_of(header)) > rank]


def sources() -> Iterator[tuple[str, str, str]]:
    """Of every file of the engine: its name, its folder, its text."""
    for path in sorted((ROOT / "src" / "bitcore").rglob("*.[ch]*")):
        if path.suffix in (".h", ".cc"):
            yield str(path.relative_to(ROOT)), path.parent.name, path.read_text()
    for header, folder in PUBLIC.items():
        yield f"include/{header}", folder, (ROOT / "include" / header).read_text()


def upward_imports(package: str, text: str) -> list[str]:
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return [name for name in found if name.split(".")[0] in above]


def test_every_public_header_has_a_place() -> None:
    headers = {str(path.relative_to(ROOT / "include")) for path in (ROOT / "include").rglob("*.h")}
    assert headers == set(PUBLIC)


def test_no_include_of_the_engine_points_up() -> None:
    found = {(name, header) for name, folder, text in sources() for header in upward_includes(folder, text)}
    assert found == KNOWN


def test_the_engine_knows_neither_torch_nor_python() -> None:
    for name, _, text in sources():
        assert not re.search(r"#include [<\"](torch|ATen|c10|Python|pybind11)", text), name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_points_up(package: str) -> None:
    for path in (ROOT / "python" / package).rglob("*.py"):
        assert upward_imports(package, path.read_text()) == [], path


def test_an_arrow_that_points_up_is_noticed() -> None:
    planted = '#include "bitcore/base/math.h"\n#include "bitcore/kernels/tile_functions.h"\n'
    assert upward_includes("packing", planted) == ["bitcore/kernels/tile_functions.h"]
    assert upward_includes("quantize", '#include "bitcore/ops/bitlinear.h"\n') == ["bitcore/ops/bitlinear.h"]
    assert upward_includes("linear", planted) == []
    assert upward_imports("bitlayers", "def f():\n    from bitmodels.base import x\n    import bitlab.cli\n") == [
        "bitmodels.base",
        "bitlab.cli",
    ]
    assert upward_imports("bitlab", "import bitmodels\nfrom bitcore import config\n") == []
