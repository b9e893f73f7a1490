"""Every snippet of the README and the docs runs, as it is written there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from test_guide_kernel import GUIDE as CPP_KERNEL_GUIDE
from test_guide_kernel import new_files

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "build" / "src" / "libbitcore.a"
# docs/core-api.md is checked in test_contract_document.py: its snippets need names that the text describes.
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs/core-api.md"}
)


class Snippet(NamedTuple):
    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets(language: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Snippet(page, text[: match.start()].count("\n") + 1, language, match[1]))
    return found


def test_there_are_snippets_in_both_languages() -> None:
    pages = {snippet.page.name for snippet in snippets("python")}
    assert {"README.md", "api.md", "packed-format.md"} <= pages
    assert snippets("cpp")


@pytest.mark.medium
@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_python_snippet(snippet: Snippet, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(snippet.code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.medium
@pytest.mark.parametrize("snippet", snippets("cpp"), ids=str)
def test_cpp_snippet(snippet: Snippet, tmp_path: Path) -> None:
    if is_example(snippet) or is_kernel_of_guide(snippet):
        return
    assert '#include "bitcore/torch.h"' not in snippet.code, (
        "ctest builds what needs LibTorch: this is no example of its"
    )
    if not ENGINE.exists():
        pytest.skip(f"the engine is not built: {ENGINE}")
    source, program = tmp_path / "snippet.cc", tmp_path / "snippet"
    source.write_text(snippet.code)
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "include"), str(source)]
    subprocess.run([*command, str(ENGINE), "-pthread", "-o", str(program)], check=True, timeout=600)
    subprocess.run([str(program)], check=True, timeout=600)


def is_example(snippet: Snippet) -> bool:
    """Whether it is, to the letter, a file of a project that ctest builds from the installed package and runs."""
    projects = [path.parent for path in (ROOT / "examples").glob("*/CMakeLists.txt")]
    listed = re.findall(r"add_example\(\S+ (\S+) ", (ROOT / "tests/cpp/CMakeLists.txt").read_text())
    built = [project for project in projects if project.name in listed]
    return snippet.code in {file.read_text() for project in built for file in project.iterdir()}


def is_kernel_of_guide(snippet: Snippet) -> bool:
    """Whether test_guide_kernel.py builds it, in a copy of the tree."""
    return any(snippet.code == text for text in new_files(CPP_KERNEL_GUIDE.read_text()).values())


@pytest.mark.parametrize("snippet", snippets("cmake"), ids=str)
def test_cmake_snippet(snippet: Snippet) -> None:
    """A whole project is one that ctest builds; anything else is a part of one, and names what the package exports."""
    if "cmake_minimum_required" in snippet.code:
        assert is_example(snippet)
    else:
        assert "bitcore::bitcore" in snippet.code


@pytest.mark.parametrize("snippet", snippets("bash"), ids=str)
def test_commands_exist(snippet: Snippet) -> None:
    """Commands that build, install or run for minutes are not run here, but none of them may name what is not there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in snippet.code.splitlines():
        words = line.split("#")[0].split()
        if words and words[0] == "make":
            assert set(words[1:]) <= targets, line
        for word in words:
            if word.startswith(("build/", "examples/", "docs/", "benchmarks/")):
                name = Path(word.split("=")[0]).name
                assert name in (ROOT / "CMakeLists.txt").read_text() + "".join(
                    path.read_text() for path in ROOT.glob("*/**/CMakeLists.txt") if ".venv" not in path.parts
                ), line


def test_the_reader_in_the_format_page_reads_our_bytes() -> None:
    """packed-format.md's reader, which imports nothing of ours, inverts pack_weights."""
    import torch

    from bitcore.ops.packing import pack_weights

    (reader,) = [snippet for snippet in snippets("python") if snippet.page.name == "packed-format.md"]
    namespace: dict[str, object] = {}
    exec(reader.code, namespace)
    unpack = namespace["unpack"]
    assert callable(unpack)
    for rows, cols in ((1, 1), (16, 16), (17, 33), (70, 130)):
        codes = torch.randint(-1, 2, (rows, cols), dtype=torch.int8)
        assert (unpack(pack_weights(codes).numpy(), cols) == codes.numpy()).all()


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if target and not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
