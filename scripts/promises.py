#!/usr/bin/env python3
"""Writes docs/promises.md: the table of tests/promises.toml, every promise and the tests that hold it."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "promises.toml"
PAGE = ROOT / "docs" / "promises.md"
KINDS = {"pytest": "", "gtest": " (C++)", "ctest": " (CTest)"}
"""Where a test is named in an entry, and what the page adds to its name."""

INTRODUCTION = """\
# What is promised, and which tests hold it

Written by `scripts/promises.py` from [tests/promises.toml](../tests/promises.toml), which names the tests of every
promise in [contract.md](contract.md) and [api.md](api.md). The tests compare with the definition in plain NumPy
([oracle.py](../tests/python/helpers/oracle.py)), with `ReferenceKernel`, or with plain PyTorch.
"""


@dataclasses.dataclass(frozen=True)
class Promise:
    """One entry of the table."""

    section: str
    title: str
    text: str
    pytest: tuple[str, ...] = ()
    gtest: tuple[str, ...] = ()
    ctest: tuple[str, ...] = ()

    def tests(self) -> list[tuple[str, str]]:
        """(kind, name) of each test."""
        return [(kind, name) for kind in KINDS for name in getattr(self, kind)]


def load_promises() -> list[Promise]:
    with TABLE.open("rb") as file:
        entries = tomllib.load(file)["promise"]
    return [Promise(e["section"], e["title"], e["text"], *(tuple(e.get(kind, ())) for kind in KINDS)) for e in entries]


def show_test(kind: str, name: str) -> str:
    """A Python test links to its file."""
    if kind != "pytest":
        return f"`{name}`{KINDS[kind]}"
    (path,) = (ROOT / "tests" / "python").rglob(name.split("::")[0])
    return f"[{name}](../{path.relative_to(ROOT)})"


def render(promises: list[Promise]) -> str:
    """The page."""
    lines = [INTRODUCTION.rstrip()]
    section = ""
    for promise in promises:
        if promise.section != section:
            section = promise.section
            lines += ["", f"## {section}", "", "| promise | tests |", "|---|---|"]
        tests = "<br>".join(show_test(kind, name) for kind, name in promise.tests())
        text = promise.text.replace("|", r"\|")
        lines.append(f"| **{promise.title}.** {text} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(load_promises()))
