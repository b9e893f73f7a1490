"""docs/guides/cpp-kernel.md: what it adds to the tree builds, and the kernel tests run the new kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mutation_check import CMAKE_OPTIONS, TREE

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs" / "guides" / "cpp-kernel.md"
KERNEL = "Int8BytesKernel"
TESTS = "*EveryKernel*:*KernelShapes*:Kernels.*:-*97x257x1025*:*MostInFeatures*"


def new_files(guide: str) -> dict[str, str]:
    """Path and text of every file that the guide adds: a snippet after a line with nothing but its path."""
    return dict(re.findall(r"^`(src/\S+)`:\n\n```cpp\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL))


def edits(guide: str) -> list[tuple[str, str, str]]:
    """(path, text before, text after) of every diff of the guide."""
    found = []
    for path, diff in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        lines = diff.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        found.append((path, before, after))
    return found


def apply(guide: str, tree: Path) -> None:
    for path, text in new_files(guide).items():
        (tree / path).write_text(text)
    for path, before, after in edits(guide):
        source = (tree / path).read_text()
        assert source.count(before) == 1, f"the guide's diff does not fit {path}:\n{before}"
        (tree / path).write_text(source.replace(before, after))


def copy_tree(tree: Path) -> None:
    """What a build of the C++ tests reads."""
    for name in TREE:
        source = ROOT / name
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_guide_adds_a_file_and_three_lines() -> None:
    guide = GUIDE.read_text()
    assert list(new_files(guide)) == ["src/bitcore/kernels/int8_bytes.cc"]
    assert [path for path, _, _ in edits(guide)] == [
        "src/bitcore/kernels/builtin.h",
        "src/bitcore/kernels/registry.cc",
        "src/bitcore/CMakeLists.txt",
    ]


def test_a_diff_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("one\ntwo\n")
    apply("```diff\n--- a.h\n one\n+more\n```\n", tmp_path)
    assert (tmp_path / "a.h").read_text() == "one\nmore\ntwo\n"
    with pytest.raises(AssertionError, match=r"does not fit a\.h"):
        apply("```diff\n--- a.h\n two\n one\n+more\n```\n", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is missing")
def test_the_kernel_of_the_guide_passes_the_kernel_tests(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    apply(GUIDE.read_text(), tmp_path)
    run("cmake", "-S", ".", "-B", "build", "-G", "Ninja", *CMAKE_OPTIONS, folder=tmp_path)
    run("cmake", "--build", "build", "--target", "bitcore_tests", folder=tmp_path)
    output = run("build/tests/cpp/bitcore_tests", f"--gtest_filter={TESTS}", folder=tmp_path)
    assert re.search(rf"^\[       OK \] .*EveryKernel\..*/{KERNEL} ", output, re.MULTILINE), "the kernel did not run"
