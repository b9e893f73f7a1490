"""tests/promises.toml names tests that exist, has every promise of the contract, and docs/promises.md shows it."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from promises import PAGE, load_promises, render
from support import ROOT

PROMISES = load_promises()
BUILD = ROOT / "build"
PROGRAMS = [BUILD / "tests" / "cpp" / f"{package}_tests" for package in ("bitcore", "bitlayers", "bitmodels")]


def python_tests() -> set[str]:
    """FILE and FILE::FUNCTION of every test function in tests/python."""
    names = set()
    for path in (ROOT / "tests" / "python").rglob("test_*.py"):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        names |= {path.name, *(f"{path.name}::{name}" for name in functions if name.startswith("test_"))}
    return names


def google_tests() -> Iterator[str]:
    """SUITE.TEST of every test of the C++ programs."""
    for program in PROGRAMS:
        done = subprocess.run([str(program), "--gtest_list_tests"], capture_output=True, text=True, check=True)
        suite = ""
        for line in done.stdout.splitlines():
            name = line.split("#")[0].strip()
            if line.startswith(" "):
                yield suite + name
            else:
                suite = name


def ctest_entries() -> set[str]:
    done = subprocess.run(
        ["ctest", "--test-dir", str(BUILD), "--show-only=json-v1"], capture_output=True, text=True, check=True
    )
    return {test["name"] for test in json.loads(done.stdout)["tests"]}


def missing(kind: str, tests: set[str]) -> list[str]:
    """What the table names of a kind and is not among `tests`."""
    named = [name for promise in PROMISES for name in getattr(promise, kind)]
    assert named
    return [name for name in named if not fnmatch.filter(tests, name)]


def test_python_tests_exist() -> None:
    assert missing("pytest", python_tests()) == []


def test_cpp_tests_exist() -> None:
    if missing_programs := [program for program in PROGRAMS if not program.exists()]:
        pytest.skip(f"the C++ tests are not built: {missing_programs}")
    assert missing("gtest", set(google_tests())) == []


def test_ctest_entries_exist() -> None:
    if not (BUILD / "CTestTestfile.cmake").exists():
        pytest.skip(f"the C++ tests are not built: {BUILD}")
    assert missing("ctest", ctest_entries()) == []


def test_a_test_that_does_not_exist_is_missing() -> None:
    assert missing("ctest", set()) == [name for promise in PROMISES for name in promise.ctest]


def test_every_promise_has_a_title_of_its_own_and_tests() -> None:
    assert len({promise.title for promise in PROMISES}) == len(PROMISES)
    for promise in PROMISES:
        assert promise.tests(), f"{promise.title}: no test"
        assert len(set(promise.tests())) == len(promise.tests()), f"{promise.title}: a test is named twice"


def test_every_promise_of_the_contract_is_in_the_table() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text()
    promised = re.findall(r"^\d\. \*\*([^*]+?)\.?\*\*", contract, re.MULTILINE)
    assert len(promised) == 6
    assert set(promised) <= {promise.title for promise in PROMISES}
    for section in ("Values that are not finite", "Who checks what"):
        assert f"## {section}\n" in contract
        assert sum(promise.section == section for promise in PROMISES) >= 3


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text() == render(PROMISES), "run scripts/promises.py"
