"""`bitlab info`, and what the command line does with misuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitcore.config import BitQuantConfig, all_configs
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitlab import __version__
from bitlab.cli import main
from bitlab.info import explain
from support import NATIVE_KERNELS, ROOT


def test_info_lists_every_kernel_and_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for name in [*NATIVE_KERNELS, "TorchKernel", "Int8Kernel", "Float32Kernel"]:
        assert name in output
    rows = [line for line in output.splitlines() if line.startswith("│ per_")]
    assert len(rows) == 8 + 5
    for config, row in zip([config for config in all_configs() if config.group_size == 128], rows, strict=True):
        assert KernelRegistry.get_kernel_for_config(config).name in row


def test_reasons() -> None:
    config = BitQuantConfig()
    assert explain(config)[1].startswith("first that covers it and runs here")
    with KernelRegistry.forced("ReferenceKernel"):
        assert explain(config) == ("ReferenceKernel", "named by KernelRegistry.forced")
    with KernelRegistry.forced("Float32Kernel"):
        name, reason = explain(config)
        assert "none" in name
        assert "int8" in reason


def test_a_registered_kernel_is_shown() -> None:
    class Mine(BitKernelBase):
        def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
            return True

    KernelRegistry.register(Mine)
    try:
        assert explain(BitQuantConfig()) == ("Mine", "registered by the user: before all built-in ones")
    finally:
        KernelRegistry.unregister("Mine")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--seeds", "0"], ["demo", "--epochs", "many"]])
def test_misuse_ends_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file" / "folder")]) == 1
    assert capsys.readouterr().err.startswith("bitlab: ")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_alone_explains_itself() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 1
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target} " in done.stdout for target in ("demo", "test", "setup", "build", "wheel"))


@pytest.mark.medium
def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitlab", "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / "python")},
    )
    assert done.returncode == 0
    assert done.stdout.strip() == f"bitlab {__version__}"


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        (["--version"], 0, f"bitlab {__version__}"),
        (["info"], 0, "torch is not installed: run `pip install"),
        (["bench"], 1, "torch is not installed: run `pip install"),
        (["demo"], 1, "torch is not installed: run `pip install"),
        (["inspect", str(ROOT / "docs")], 1, "neither model.safetensors nor"),
    ],
)
def test_without_torch(arguments: list[str], code: int, answer: str) -> None:
    program = "import sys; sys.modules['torch'] = None; from bitlab.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert answer in done.stdout + done.stderr
