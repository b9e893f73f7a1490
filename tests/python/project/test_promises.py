"""tests/promises.toml names tests that exist, and docs/promises.md has every promise of it and of the contract."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from promises import PAGE, Case, Promise, anchor, list_ctest, load_promises, matches, read_ctest, read_gtest
from support import ROOT

PROMISES = load_promises()
BUILD = ROOT / "build"
PROGRAM = BUILD / "tests" / "cpp" / "bitcore_tests"


def python_tests() -> set[str]:
    """FILE::FUNCTION of every test function in tests/python."""
    return {
        f"{path.name}::{node.name}"
        for path in (ROOT / "tests" / "python").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def google_tests() -> Iterator[str]:
    """SUITE.TEST of every test of the C++ program."""
    done = subprocess.run([str(PROGRAM), "--gtest_list_tests"], capture_output=True, text=True, check=True, timeout=60)
    suite = ""
    for line in done.stdout.splitlines():
        name = line.split("#")[0].strip()
        if line.startswith(" "):
            yield suite + name
        else:
            suite = name


def assert_exist(kind: str, tests: set[str]) -> None:
    for promise in PROMISES:
        for name in getattr(promise, kind):
            assert any(matches(kind, name, test) for test in tests), f"{promise.title}: there is no {kind} {name}"


def test_python_tests_exist() -> None:
    assert_exist("pytest", python_tests())


def test_cpp_tests_exist() -> None:
    if not PROGRAM.exists():
        pytest.skip(f"the C++ tests are not built: {PROGRAM}")
    assert_exist("gtest", set(google_tests()))


def test_ctest_entries_exist() -> None:
    if not (BUILD / "CTestTestfile.cmake").exists():
        pytest.skip(f"the C++ tests are not built: {BUILD}")
    assert_exist("ctest", set(list_ctest(BUILD)))


def test_a_test_that_does_not_exist_is_noticed() -> None:
    assert matches("pytest", "test_a.py::test_b", "test_a.py::test_b[1]")
    assert matches("pytest", "test_a.py", "test_a.py::test_b")
    assert not matches("pytest", "test_a.py::test_b", "test_a.py::test_bc")
    assert matches("gtest", "*Shapes.*", "Sweep/Shapes.Match/1")
    assert not matches("ctest", "Emulated.*", "Install")


@pytest.mark.parametrize(
    ("entry", "outcome"),
    [
        ('<testcase status="run"/>', ("passed", "")),
        ('<testcase status="fail"><failure message=""/></testcase>', ("failed", "")),
        ('<testcase status="notrun"><skipped message="Fixture dependency failed"/></testcase>', ("failed", "")),
        (
            '<testcase status="notrun"><skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/>'
            "<system-out>skipped: there is no clang++</system-out></testcase>",
            ("skipped", "there is no clang++"),
        ),
    ],
)
def test_outcomes_of_ctest(entry: str, outcome: tuple[str, str]) -> None:
    assert read_ctest(ElementTree.fromstring(entry)) == outcome


def test_outcomes_and_kernels_of_googletest(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text("""<testsuites><testsuite>
      <testcase name="Adds" classname="Kernel" status="run">
        <properties><property name="kernels" value="AKernel BKernel"/></properties>
      </testcase>
      <testcase name="Fails" classname="Kernel" status="run"><failure message="no"/></testcase>
      <testcase name="Lacks" classname="Kernel" status="run"><skipped message="a.cc:1&#x0A;no AVX"/></testcase>
      <testcase name="Filtered" classname="Kernel" status="notrun"/>
    </testsuite></testsuites>""")
    assert read_gtest(report) == [
        Case("Kernel.Adds", "passed", "", frozenset({"AKernel", "BKernel"})),
        Case("Kernel.Fails", "failed"),
        Case("Kernel.Lacks", "skipped", "no AVX"),
    ]


def test_every_promise_has_a_test_and_a_title_of_its_own() -> None:
    titles = [promise.title for promise in PROMISES]
    assert len({anchor(title) for title in titles}) == len(titles)
    for promise in PROMISES:
        assert promise.tests(), f"{promise.title}: no test"
        assert len(set(promise.tests())) == len(promise.tests()), f"{promise.title}: a test is named twice"


def test_every_promise_of_the_contract_is_in_the_table() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text()
    titles = {promise.title for promise in PROMISES}
    promised = re.findall(r"^\d\. \*\*([^*]+?)\.?\*\*", contract, re.MULTILINE)
    assert len(promised) == 6
    assert set(promised) <= titles
    for section in ("Values that are not finite", "Who checks what"):
        rows = [line for line in contract.split(f"## {section}\n")[1].split("\n##")[0].splitlines() if line[:1] == "|"]
        assert len(rows) > 2
        assert sum(promise.section == section for promise in PROMISES) >= 3


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def of_page(page: str, promise: Promise) -> str:
    """The part of the page about one promise."""
    found = re.search(rf"^### {re.escape(promise.title)}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"`make promises` is due: the page lacks {promise.title}"
    return found[1]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.title)
def test_the_page_has_the_promise_and_its_tests(page: str, promise: Promise) -> None:
    part = of_page(page, promise)
    assert promise.text in part
    rows = [line.replace(r"\*", "*") for line in part.splitlines() if line.startswith("| ")][1:]
    names = [re.sub(r"^\| \[?([^\]( ]+).*", r"\1", row) for row in rows]
    assert names == [name for _, name in promise.tests()], "`make promises` is due"
    assert "passed" in part, "no test of it passed"
    assert "failed" not in part.replace(promise.text, "")
    assert "NOT RUN" not in part


def test_the_page_names_no_promise_that_there_is_not(page: str) -> None:
    assert re.findall(r"^### (.+)$", page, re.MULTILINE) == [promise.title for promise in PROMISES]
