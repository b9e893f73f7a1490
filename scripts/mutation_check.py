#!/usr/bin/env python3
"""Breaks the kernels one line at a time and expects the kernel tests to notice each.

Every mutation of scripts/mutations.toml is applied to a scratch copy of the tree, built, and tested: kernels for x86-64
here, those for ARM64 cross-compiled and under qemu-aarch64. A mutation is noticed when the tests fail, crash or do not
end in time. The exit status is 1 where one survives, and 2 where one does not match its file or does not compile.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "scripts" / "mutations.toml"
# What a build of the C++ tests reads.
TREE = ("CMakeLists.txt", "cmake", "include", "src", "benchmarks", "bindings", "tests/builds", "tests/cpp")
TEST_SECONDS = 300

# -O1: half the time to compile, and the kernels are still fast enough.
CMAKE_OPTIONS = ("-DBITLAB_TORCH=OFF", "-DBITLAB_TOOLS=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG")
MACHINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # options of CMake, how the tests are started
    "x86": ((), ()),
    "arm64": (
        ("-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake",),
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max"),
    ),
}
# The first failure ends the program. The left-out shape takes long under an emulator and shows nothing more.
TEST_OPTIONS = ("--gtest_filter=*Kernel*:RowFunctions*:-*97x257x1025*", "--gtest_break_on_failure", "--gtest_brief=1")


@dataclasses.dataclass(frozen=True)
class Mutation:
    path: str
    machine: str
    text: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}  ->  {self.replacement}"

    def apply(self, source: str) -> str:
        """Raises ValueError where the text is not exactly once in `source`."""
        if (count := source.count(self.text)) != 1:
            raise ValueError(f"{self}: found {count} times, expected once")
        return source.replace(self.text, self.replacement)


def load_mutations() -> list[Mutation]:
    with LIST.open("rb") as file:
        files = tomllib.load(file)
    return [
        Mutation(path, entry["machine"], text, replacement)
        for path, entry in files.items()
        for text, replacement in entry["mutations"]
    ]


class Scratch:
    """A copy of the tree with a build for one machine."""

    def __init__(self, machine: str, directory: Path) -> None:
        self.tree = directory / machine
        self.build = directory / f"{machine}-build"
        options, self.emulator = MACHINES[machine]
        for name in TREE:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source, self.tree / name)
        configure = ["cmake", "-S", ".", "-B", str(self.build), "-G", "Ninja", *CMAKE_OPTIONS, *options]
        subprocess.run(configure, cwd=self.tree, check=True, stdout=subprocess.DEVNULL)
        if not self.compiles():
            sys.exit(f"the unchanged tree does not build for {machine}")
        if not self.passes():
            sys.exit(f"the unchanged tree fails its tests on {machine}")

    def compiles(self) -> bool:
        command = ["cmake", "--build", str(self.build), "--target", "bitcore_tests"]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    def passes(self) -> bool:
        command = [*self.emulator, str(self.build / "tests" / "cpp" / "bitcore_tests"), *TEST_OPTIONS]
        try:
            return subprocess.run(command, capture_output=True, timeout=TEST_SECONDS).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def outcome(self, mutation: Mutation) -> str:
        file = self.tree / mutation.path
        original = file.read_text()
        try:
            file.write_text(mutation.apply(original))
            if not self.compiles():
                return "does not compile"
            return "SURVIVED" if self.passes() else "noticed"
        finally:
            file.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="only files whose path contains one of these; none: all")
    parser.add_argument("--machine", choices=sorted(MACHINES), help="only the kernels of this machine")
    arguments = parser.parse_args()

    mutations = [
        m
        for m in load_mutations()
        if any(part in m.path for part in arguments.files or [""]) and arguments.machine in (None, m.machine)
    ]
    if not mutations:
        parser.error("no mutation fits")
    for mutation in mutations:
        mutation.apply((ROOT / mutation.path).read_text())

    outcomes: dict[Mutation, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        scratches: dict[str, Scratch] = {}
        for mutation in mutations:
            if mutation.machine not in scratches:
                scratches[mutation.machine] = Scratch(mutation.machine, Path(directory))
            outcomes[mutation] = scratches[mutation.machine].outcome(mutation)
            print(f"{outcomes[mutation]:16} {mutation}", flush=True)
    for path in dict.fromkeys(m.path for m in mutations):
        found = [outcome for mutation, outcome in outcomes.items() if mutation.path == path]
        print(f"{path}: {found.count('noticed')} of {len(found)} noticed")
    if "does not compile" in outcomes.values():
        return 2
    return 1 if "SURVIVED" in outcomes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
