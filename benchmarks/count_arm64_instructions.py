#!/usr/bin/env python3
"""Counts the instructions that an ARM64 kernel's tile functions execute, under qemu-aarch64.

No ARM64 machine is needed: a count is no time, but it is exact, repeatable, and shows what a change to the inner loops
does. Printed are instructions for 1,000 multiply-adds, and the share of them that multiplies: with one multiplying
instruction a cycle that share bounds the part of the peak that the kernel can reach.

Needs Debian's qemu-user and g++-aarch64-linux-gnu, and the library that the C++ tests cross-compile:

    ctest --test-dir build -R Emulated.Arm64.Build
    benchmarks/count_arm64_instructions.py
"""

import argparse
import collections
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "tests" / "cpp" / "arm64" / "src" / "libbitcore.a"
# Kernel: its source, its multiplying instruction.
KERNELS = {
    "Int8NeonDotKernel": ("int8_neondot.cc", "sdot"),
    "Int8NeonKernel": ("int8_neon.cc", "smlal"),
    "Float32NeonKernel": ("float32_neon.cc", "fmla"),
}
# Not counted: the driver calls them once for a row of x or of y.
ROW_FUNCTIONS = ("quantize", "absmax", "store_", "pack_token")


def tile_ranges(program: Path, source: str) -> list[tuple[int, int]]:
    """First and last address of every function of the file `source` but ROW_FUNCTIONS."""
    symbols = subprocess.run(["aarch64-linux-gnu-readelf", "-sW", program], check=True, capture_output=True, text=True)
    ranges, file = [], ""
    for fields in (line.split() for line in symbols.stdout.splitlines()):
        if len(fields) == 8 and fields[3] == "FILE":
            file = fields[7]
        elif len(fields) == 8 and fields[3:5] == ["FUNC", "LOCAL"] and file == source:
            _, address, size, *_, name = fields
            if not any(part in name for part in ROW_FUNCTIONS):
                ranges.append((int(address, 16), int(address, 16) + int(size, 0) - 1))
    return ranges


def mnemonics(program: Path) -> dict[int, str]:
    """The instruction at every address."""
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", program], check=True, capture_output=True, text=True
    )
    return {
        int(address, 16): name for address, name in re.findall(r"^ *([0-9a-f]+):\t(\S+)", text.stdout, re.MULTILINE)
    }


def count(program: Path, kernel: str, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Executed instructions of the kernel's tile functions, and how many of them multiply."""
    source, multiply = KERNELS[kernel]
    at = mnemonics(program)
    ranges = ",".join(f"{first:#x}..{last:#x}" for first, last in tile_ranges(program, source))
    # One instruction a block, every block logged when it is entered: "Trace 0: <host> [<flags>/<address>/...".
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max", "-singlestep", "-d", "exec,nochain"]
    command += ["-dfilter", ranges, str(program), kernel, *map(str, shape)]
    executed: collections.Counter[str] = collections.Counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Trace"):
                executed[at[int(line.split("/")[1], 16)]] += 1
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return executed.total(), sum(n for name, n in executed.items() if name.startswith(multiply))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-features", type=int, default=64)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 60], help="rows of x")
    arguments = parser.parse_args()
    if not LIBRARY.exists():
        parser.error(f"{LIBRARY} is missing: ctest --test-dir build -R Emulated.Arm64.Build")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "one_forward"
        source = ROOT / "benchmarks" / "one_forward.cc"
        compiler = ["aarch64-linux-gnu-g++", "-std=c++20", "-O2", "-no-pie", "-pthread", f"-I{ROOT}/include"]
        subprocess.run([*compiler, str(source), str(LIBRARY), "-o", str(program)], check=True)
        for kernel in KERNELS:
            for rows in arguments.rows:
                shape = (rows, arguments.out_features, arguments.in_features)
                total, multiplying = count(program, kernel, shape)
                per_thousand = 1000 * total / (shape[0] * shape[1] * shape[2])
                print(
                    f"{kernel:18} {rows:4} rows: {per_thousand:6.1f} instructions for 1,000 multiply-adds, "
                    f"{100 * multiplying / total:.0f} % {KERNELS[kernel][1]}"
                )


if __name__ == "__main__":
    main()
