#!/usr/bin/env python3
"""Runs the tests that hold the promises of tests/promises.toml and writes docs/promises.md.

The page says of each promise which tests hold it, how they ended, and which kernels ran in them. Needs what `make test`
needs, and its build. The exit status is 1 where a test fails, and where a promise has no test that passed here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "promises.toml"
PAGE = ROOT / "docs" / "promises.md"
KINDS = ("pytest", "gtest", "ctest")
SECONDS = 1800  # Of all that runs beside each other.
RESULTS = "BITLAB_PROMISES_RESULTS"
"""The environment variable with the file into which pytest, with this module as a plugin, writes its results."""


@dataclasses.dataclass(frozen=True)
class Promise:
    section: str
    title: str
    text: str
    pytest: tuple[str, ...] = ()
    gtest: tuple[str, ...] = ()
    ctest: tuple[str, ...] = ()

    def tests(self) -> list[tuple[str, str]]:
        """(kind, name) of each."""
        return [(kind, name) for kind in KINDS for name in getattr(self, kind)]


def load_promises() -> list[Promise]:
    with TABLE.open("rb") as file:
        entries = tomllib.load(file)["promise"]
    return [Promise(e["section"], e["title"], e["text"], *(tuple(e.get(kind, ())) for kind in KINDS)) for e in entries]


@dataclasses.dataclass
class Case:
    """How one test ended."""

    name: str
    outcome: str  # "passed", "skipped" or "failed"
    reason: str = ""
    kernels: frozenset[str] = frozenset()


# --- pytest, with this module as a plugin ----------------------------------------------------------------------------


class Recorder:
    """Writes how each test ended, and which kernels computed tiles in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[str, Case] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("/")[-1]
        case = self.cases.setdefault(name, Case(name, "passed"))
        if report.failed:
            case.outcome = "failed"
        elif report.skipped:
            case.outcome = "skipped"
            case.reason = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(
            json.dumps([dataclasses.asdict(case) | {"kernels": sorted(case.kernels)} for case in self.cases.values()])
        )


def pytest_configure(config: Any) -> None:
    import pytest

    from bitcore.kernels.builtin import BUILTIN_KERNELS, NativeKernel, tile_calls

    native = [kernel.name for kernel in BUILTIN_KERNELS if isinstance(kernel, NativeKernel)]
    recorder = Recorder(Path(os.environ[RESULTS]))
    config.pluginmanager.register(recorder)

    class Kernels:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            before = {name: tile_calls(name) for name in native}
            result = yield
            case = recorder.cases[item.nodeid.split("/")[-1]]
            ran = {name for name in native if tile_calls(name) != before[name]}
            # It has no tiles to count: it ran where the test is about it.
            if case.outcome == "passed" and "TorchKernel" in item.nodeid:
                ran.add("TorchKernel")
            case.kernels = frozenset(ran)
            return result

    config.pluginmanager.register(Kernels())


def run_pytest(names: list[str]) -> list[Case]:
    if not names:
        return []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT / 'python'}", RESULTS: str(results)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "promises", "-p", "no:cacheprovider"]
        tests = sorted(
            {name for name in names if "::" not in name} | {n for n in names if n.split("::")[0] not in names}
        )
        subprocess.run(
            [*command, *(str(test_file(n)) + n[len(n.split("::")[0]) :] for n in tests)],
            cwd=ROOT,
            env=environment,
            timeout=SECONDS,
        )
        return [
            Case(c["name"], c["outcome"], c["reason"], frozenset(c["kernels"])) for c in json.loads(results.read_text())
        ]


# --- GoogleTest and CTest --------------------------------------------------------------------------------------------


def read_gtest(path: Path) -> list[Case]:
    """The tests of an XML report; tests/cpp/bitcore/record_kernels.cc puts the kernels there."""
    cases = []
    for test in ElementTree.parse(path).iter("testcase"):
        if test.get("status") != "run":  # left out by the filter, or only listed
            continue
        skipped = test.find("skipped")
        kernels = [p.get("value") or "" for p in test.iter("property") if p.get("name") == "kernels"]
        cases.append(
            Case(
                f"{test.get('classname')}.{test.get('name')}",
                "failed" if test.find("failure") is not None else "passed" if skipped is None else "skipped",
                "" if skipped is None else (skipped.get("message") or "").strip().splitlines()[-1],
                frozenset(name for text in kernels for name in text.split()),
            )
        )
    return cases


def run_gtest(build: Path, names: list[str]) -> list[Case]:
    if not names:
        return []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        program = build / "tests" / "cpp" / "bitcore_tests"
        filters = f"--gtest_filter={':'.join(names)}"
        subprocess.run([str(program), filters, f"--gtest_output=xml:{report}", "--gtest_brief=1"], timeout=SECONDS)
        return read_gtest(report)


def list_ctest(build: Path) -> list[str]:
    """Names of CTest's entries, the GoogleTest cases among them."""
    done = subprocess.run(
        ["ctest", "--test-dir", str(build), "--show-only=json-v1"], capture_output=True, text=True, check=True
    )
    return [test["name"] for test in json.loads(done.stdout)["tests"]]


def read_ctest(entry: ElementTree.Element) -> tuple[str, str]:
    """(outcome, reason) of an entry of a JUnit report."""
    if entry.get("status") == "run":
        return "passed", ""
    skipped = entry.find("skipped")
    # An entry whose preparation failed is "skipped", too, but not by a rule of its own.
    if skipped is None or not (skipped.get("message") or "").startswith("SKIP_"):
        return "failed", ""
    said = re.search(r"skipped: *(.+)", entry.findtext("system-out") or "")
    return "skipped", said[1] if said else "it says no reason"


def run_ctest(build: Path, name: str) -> Case:
    """One entry, with what it needs. Kernels: of all GoogleTest programs that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["ctest", "--test-dir", str(build), "-R", f"^{re.escape(name)}$", "--output-junit", str(report)]
        environment = os.environ | {"GTEST_OUTPUT": f"xml:{folder}/gtest/"}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=SECONDS)
        (entry,) = [test for test in ElementTree.parse(report).iter("testcase") if test.get("name") == name]
        outcome, reason = read_ctest(entry)
        paths = Path(folder).glob("gtest/*.xml")
        kernels = frozenset(kernel for path in paths for case in read_gtest(path) for kernel in case.kernels)
        print(f"{name}: {outcome}", flush=True)
        return Case(name, outcome, reason, kernels)


def run_all(build: Path, promises: Iterable[Promise]) -> dict[tuple[str, str], list[Case]]:
    """The cases of every (kind, name): Python and C++ tests beside CTest's entries."""
    named = {kind: sorted({name for p in promises for name in getattr(p, kind)}) for kind in KINDS}
    entries = sorted({e for e in list_ctest(build) for name in named["ctest"] if fnmatch.fnmatchcase(e, name)})
    with ThreadPoolExecutor() as pool:
        ctest = pool.submit(lambda: [run_ctest(build, entry) for entry in entries])
        cases = {"gtest": run_gtest(build, named["gtest"]), "pytest": run_pytest(named["pytest"])}
        cases["ctest"] = ctest.result()
    return {(k, name): [c for c in cases[k] if matches(k, name, c.name)] for k in KINDS for name in named[k]}


def matches(kind: str, name: str, case: str) -> bool:
    """Whether a test's full name is one of those that the table means."""
    if kind == "pytest":
        return case.split("[")[0] == name or case.split("::")[0] == name
    return fnmatch.fnmatchcase(case, name)


# --- the page --------------------------------------------------------------------------------------------------------


def kernel_order(name: str) -> tuple[int, str]:
    return next((i for i, prefix in enumerate(("Int8", "Float32", "Reference")) if name.startswith(prefix)), 3), name


def kernel_list(cases: Iterable[Case]) -> str:
    names = sorted({kernel for case in cases for kernel in case.kernels}, key=kernel_order)
    return ", ".join(name.removesuffix("Kernel") for name in names) or "-"


def counts(cases: Iterable[Case]) -> str:
    found = Counter(case.outcome for case in cases)
    return (
        ", ".join(f"{found[outcome]:,} {outcome}" for outcome in ("passed", "skipped", "failed") if found[outcome])
        or "NOT RUN"
    )


def test_file(name: str) -> Path:
    """Of FILE or FILE::FUNCTION."""
    (found,) = (ROOT / "tests" / "python").rglob(name.split("::")[0])
    return found


def link(kind: str, name: str) -> str:
    return (
        f"[{name}](../{test_file(name).relative_to(ROOT)})"
        if kind == "pytest"
        else f"{name} ({'C++' if kind == 'gtest' else 'ctest'})"
    )


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def machine(build: Path) -> list[tuple[str, str]]:
    import torch

    from bitcore.kernels.builtin import CPU_FEATURES
    from bitlab import __version__

    cache = (build / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    version = (
        subprocess.run([compiler[1], "--version"], capture_output=True, text=True).stdout if compiler else "unknown"
    )
    return [
        ("command", "`make promises`"),
        ("date", datetime.now(UTC).date().isoformat()),
        ("processor", f"{cpu_name()}, {platform.machine()}, {os.cpu_count()} threads: {', '.join(CPU_FEATURES)}"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("versions", f"bitlab {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("compiler", version.splitlines()[0]),
    ]


INTRODUCTION = """\
# What is promised, and what holds it

`make promises` wrote this page: it ran the tests of [tests/promises.toml](../tests/promises.toml), which names them for
every promise of [contract.md](contract.md) and [api.md](api.md), and recorded how they ended and which kernels computed
tiles in them. A test compares with the definition in plain NumPy ([oracle.py](../tests/python/helpers/oracle.py)), with
`ReferenceKernel`, or with plain PyTorch.

Kernels are named without their ending `Kernel`. Those of other CPUs ran under emulation (`Emulated.*`, QEMU), and
`Int8AvxVnniEvex` is `Int8AvxVnniKernel` in the encoding that CPUs with AVX-512 have. What runs in a process of its own,
or computes no layer, shows no kernel: `-`.
"""


def write_page(build: Path, promises: list[Promise], results: dict[tuple[str, str], list[Case]]) -> str:
    lines = [INTRODUCTION, "| this run | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine(build)]
    lines += ["", "| promise | tests | kernels |", "|---|---|---|"]
    for promise in promises:
        held = unique({test: results[test] for test in promise.tests()})
        lines.append(f"| [{promise.title}](#{anchor(promise.title)}) | {counts(held)} | {kernel_list(held)} |")
    reasons = Counter(case.reason for case in unique(results) if case.outcome == "skipped")
    lines += ["", "## Skipped, and why", "", "| reason | tests |", "|---|---|"]
    lines += [f"| {reason} | {count:,} |" for reason, count in sorted(reasons.items())] or ["| none | 0 |"]
    section = ""
    for promise in promises:
        if promise.section != section:
            section = promise.section
            lines += ["", f"## {section}"]
        lines += ["", f"### {promise.title}", "", promise.text, "", "| test | result | kernels |", "|---|---|---|"]
        for kind, name in promise.tests():
            cases = results[kind, name]
            lines.append(f"| {link(kind, name)} | {counts(cases)} | {kernel_list(cases)} |".replace("*", r"\*"))
    return "\n".join(lines) + "\n"


def unique(results: dict[tuple[str, str], list[Case]]) -> list[Case]:
    return list({(kind, case.name): case for (kind, _), cases in results.items() for case in cases}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder of the build (%(default)s)")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (%(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="only promises with this in their title; for a quick look")
    arguments = parser.parse_args()
    promises = [p for p in load_promises() if arguments.only is None or arguments.only in p.title]
    if not promises:
        parser.error(f"no promise has {arguments.only!r} in its title")

    results = run_all(arguments.build, promises)
    arguments.output.write_text(write_page(arguments.build, promises, results))
    failed = [case.name for case in unique(results) if case.outcome == "failed"]
    empty = [p.title for p in promises if not any(c.outcome == "passed" for t in p.tests() for c in results[t])]
    print(f"{arguments.output}: {counts(unique(results))}")
    for name in failed:
        print(f"failed: {name}")
    for title in empty:
        print(f"no test passed here: {title}")
    return 1 if failed or empty else 0


if __name__ == "__main__":
    sys.exit(main())
