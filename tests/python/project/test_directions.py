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

# Headers among the sources for all C++ packages of the project above them, and for no user.
SHARED = {
    *(f"bitcore/base/{name}.h" for name in ("aligned_array", "arena", "checks", "cpu_features", "float_types-inl")),
    *(f"bitcore/base/{name}.h" for name in ("math", "parallel", "scales")),
    "bitcore/io/json.h",
    "bitcore/packing/code_rows.h",
    "bitcore/quantize/quantize-inl.h",
    *(f"bitlayers/{name}.h" for name in ("attention_functions", "layer_functions", "path", "rotary")),
    "bitlayers/ternary_embedding.h",
}

# Within bitcore: modules and packages, each importing only what stands in a line before its own, or in it.
MODULES = (
    ("_requirements", "_library", "_torch_private", "_after_torch", "_c_api", "exceptions"),
    ("config",),
    ("config_keyword", "engine"),
    ("operators",),
    ("kernels",),
    ("ops",),
    ("testing", "_api"),
)


def included(text: str) -> list[str]:
    return re.findall(r'^#include "((?:bitcore|bitlayers|bitmodels|bitlab)/[^"]+)"', text, re.MULTILINE)


def folder_of(header: str) -> str:
    return PUBLIC.get(header) or header.split("/")[1]


def upward_includes(folder: str, text: str) -> list[str]:
    rank = FOLDERS.index(folder)
    return [
        header
        for header in included(text)
        if not header.startswith("bitcore/") or FOLDERS.index(folder_of(header)) > rank
    ]


def foreign_includes(package: str, text: str) -> list[str]:
    """Includes of packages above, and of files of packages below that are neither public nor shared."""
    found = []
    for header in included(text):
        owner = header.split("/")[0]
        above = PACKAGES.index(owner) > PACKAGES.index(package)
        private = owner != package and header not in SHARED and not (ROOT / "include" / header).is_file()
        found += [header] * (above or private)
    return found


def files_of(*folders: str) -> Iterator[tuple[str, str]]:
    """Of every C++ file below the folders: its name, its text."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.[ch]*")):
            if path.suffix in (".h", ".cc"):
                yield str(path.relative_to(ROOT)), path.read_text()


def sources() -> Iterator[tuple[str, str, str]]:
    """Of every file of the engine: its name, its folder, its text."""
    for name, text in files_of("src/bitcore"):
        yield name, name.split("/")[-2], text
    for header, folder in PUBLIC.items():
        yield f"include/{header}", folder, (ROOT / "include" / header).read_text()


def imports(text: str) -> list[tuple[str, str]]:
    """Each import's module, and what is taken from it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def upward_imports(package: str, text: str) -> list[str]:
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    return [module for module, _ in imports(text) if module.split(".")[0] in above]


def part_of(module: str, name: str = "") -> str:
    """The part of bitcore that an import names."""
    parts = [*module.split("."), name]
    return parts[1] if parts[0] == "bitcore" else ""


def upward_parts(part: str, text: str) -> list[str]:
    rank = {name: index for index, line in enumerate(MODULES) for name in line}
    found = {part_of(*taken) for taken in imports(text)} & rank.keys()
    return sorted(name for name in found if rank[name] > rank[part])


def private_imports(package: str, part: str, text: str) -> list[str]:
    """Names with an underscore that belong to another package, or within bitcore to another part."""
    found = []
    for module, name in imports(text):
        path = [*module.split("."), name]
        if path[0] not in PACKAGES or (path[0] == package and (package != "bitcore" or path[1] == part)):
            continue
        # bitcore's top-level modules with an underscore are for all packages of the project, and for no user.
        shared = path[0] == "bitcore" and len(path) > 1 and path[1] in MODULES[0]
        private = [each for each in path[2 if shared else 1 :] if each.startswith("_") and each != "__version__"]
        found += [f"{module}.{name}"] * bool(private)
    return found


def test_every_public_header_has_a_place() -> None:
    headers = {name.removeprefix("include/") for name, _ in files_of("include/bitcore")}
    assert headers == set(PUBLIC)


def test_no_include_of_the_engine_points_up() -> None:
    found = {(name, header) for name, folder, text in sources() for header in upward_includes(folder, text)}
    assert found == set()


@pytest.mark.parametrize("package", ["bitlayers", "bitmodels"])
def test_no_include_of_another_cpp_package_points_up_or_inside(package: str) -> None:
    files = list(files_of(f"include/{package}", f"src/{package}"))
    assert files
    assert {name: found for name, text in files if (found := foreign_includes(package, text))} == {}


def test_the_public_headers_include_public_headers_only() -> None:
    for name, text in files_of("include"):
        assert [header for header in included(text) if not (ROOT / "include" / header).is_file()] == [], name


def test_the_cpp_packages_know_neither_torch_nor_python() -> None:
    for name, text in files_of("include", "src"):
        assert not re.search(r"#include [<\"](torch|ATen|c10|Python|pybind11)", text), name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_points_up(package: str) -> None:
    for path in (ROOT / "python" / package).rglob("*.py"):
        assert upward_imports(package, path.read_text()) == [], path


def parts_of_bitcore() -> Iterator[tuple[str, str, str]]:
    """Of every file: its name, its part, its text. `__init__` and what runs before it belong to no part."""
    root = ROOT / "python" / "bitcore"
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        if part != "__init__":
            yield str(path.relative_to(ROOT)), part, path.read_text()


def test_no_part_of_bitcore_imports_what_stands_on_it() -> None:
    listed = {name for line in MODULES for name in line}
    for name, part, text in parts_of_bitcore():
        assert part in listed, name
        assert upward_parts(part, text) == [], name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_private_name_is_imported_by_another_package(package: str) -> None:
    root = ROOT / "python" / package
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        if part != "__init__":
            assert private_imports(package, part, path.read_text()) == [], path


def test_an_arrow_that_points_up_is_noticed() -> None:
    planted = '#include "bitcore/base/math.h"\n#include "bitcore/kernels/tile_functions.h"\n'
    assert upward_includes("packing", planted) == ["bitcore/kernels/tile_functions.h"]
    assert upward_includes("quantize", '#include "bitcore/ops/bitlinear.h"\n') == ["bitcore/ops/bitlinear.h"]
    assert upward_includes("linear", planted) == []
    assert upward_includes("linear", '#include "bitlayers/bitlinear.h"\n') == ["bitlayers/bitlinear.h"]
    assert foreign_includes("bitlayers", planted + '#include "bitmodels/mlp.h"\n#include "bitcore/io.h"\n') == [
        "bitcore/kernels/tile_functions.h",
        "bitmodels/mlp.h",
    ]
    assert foreign_includes("bitmodels", '#include "bitlayers/bitlinear.h"\n#include "bitcore/io/json.h"\n') == []
    assert upward_imports("bitlayers", "def f():\n    from bitmodels.base import x\n    import bitlab.cli\n") == [
        "bitmodels.base",
        "bitlab.cli",
    ]
    assert upward_imports("bitlab", "import bitmodels\nfrom bitcore import config\n") == []
    assert upward_parts("kernels", "from bitcore.ops import bitlinear\nfrom bitcore import testing, config\n") == [
        "ops",
        "testing",
    ]
    assert private_imports("bitlayers", "convert", "from bitcore.kernels.registry import _state, find\n") == [
        "bitcore.kernels.registry._state"
    ]
    assert private_imports(
        "bitcore", "kernels", "from bitcore.operators._hidden import x\nimport bitcore._library\n"
    ) == ["bitcore.operators._hidden.x"]
