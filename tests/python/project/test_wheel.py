"""What `make wheel` builds works away from the tree, and links nothing that ties it to one Python or one torch."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from checkpoints import as_floats, hugging_face, tiny
from support import ROOT
from test_docs_snippets import Snippet, snippets

PACKAGES = ("bitcore", "bitlab", "bitlayers", "bitmodels")
README_SNIPPETS = [snippet for snippet in snippets("python") if snippet.page.name == "README.md"]
LIBRARY = "bitcore/lib/libbitcore_torch.so"
LIMITS = "bitlab/lib/libbitlab_limits.so"
ENGINE = "bitcore/lib/libbitlab.so"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are missing"),
]


def run(command: list[str], folder: Path, timeout: float = 600) -> str:
    """What a command prints; it sees no PYTHONPATH and does not stand in the tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command of `make wheel`."""
    folder = tmp_path_factory.mktemp("dist")
    run(["scripts/build-wheel.sh", sys.executable, str(folder), "--no-index"], ROOT, timeout=600)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, and torch and the other dependencies from where they are."""
    folder = tmp_path_factory.mktemp("new") / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--no-index", "--no-deps", str(wheel)], folder)
    # Python adds these folders, but obeys no .pth file in them: an editable installation of the tree is out of sight.
    modules = [importlib.import_module(name) for name in ("torch", "safetensors", "numpy", "rich", "typing_extensions")]
    places = {str(Path(str(module.__file__)).parent.parent) for module in modules if hasattr(module, "__path__")}
    (site_packages(folder) / "dependencies.pth").write_text("".join(f"{place}\n" for place in sorted(places)))
    return folder


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))


def run_python(environment: Path, folder: Path, code: str) -> str:
    (folder / "code.py").write_text(code)
    return run([str(environment / "bin" / "python"), "code.py"], folder)


# --- what is in it --------------------------------------------------------------------------------------------------


def test_one_wheel_for_every_python_3_of_this_platform(wheel: Path) -> None:
    """The tag names the oldest glibc that it runs on, which is that of its newest symbol."""
    match = re.fullmatch(rf"bitlab-[0-9.]+-(py3-none-manylinux_2_(\d+)_{platform.machine()})\.whl", wheel.name)
    assert match is not None, wheel.name
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        text = archive.read(name).decode()
    assert re.findall("^Tag: (.*)$", text, re.MULTILINE) == [match[1]]
    assert "Root-Is-Purelib: false" in text
    report = run([sys.executable, "-m", "auditwheel", "show", str(wheel)], ROOT)
    symbols = {int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", report)}
    assert symbols
    assert max(symbols) <= int(match[2])


def test_what_it_requires(wheel: Path) -> None:
    """torch is an extra."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        required = re.findall("^Requires-Dist: (.*)$", archive.read(name).decode(), re.MULTILINE)
    always = {re.split("[<>=]", line)[0].replace("_", "-") for line in required if "extra" not in line}
    assert always == {"gguf", "huggingface-hub", "jinja2", "numpy", "rich", "safetensors", "tokenizers"}
    assert any(re.fullmatch(r"torch>=2\.10; extra == [\"']torch[\"']", line) for line in required)


def test_contents(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        (license_file,) = [name for name in modes if name.endswith("licenses/LICENSE")]
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    expected = {
        str(path.relative_to(ROOT / "python"))
        for package in PACKAGES
        for path in (ROOT / "python" / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    files = {name for name in modes if ".dist-info/" not in name and not name.endswith("/")}
    assert files == expected | {LIBRARY, LIMITS, ENGINE, "bitcore/bin/run_bitmlp"}
    assert modes["bitcore/bin/run_bitmlp"] & stat.S_IXUSR


# --- what it does ---------------------------------------------------------------------------------------------------


def test_it_is_the_wheel_that_runs(environment: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, importlib.metadata
from bitcore import _library

for name in {PACKAGES}:
    print(importlib.import_module(name).__file__)
print(_library.PATH)
print(importlib.metadata.distribution("bitlab").locate_file("bitlab/__init__.py"))
"""
    places = run_python(environment, tmp_path, code).splitlines()
    assert len(places) == 6
    assert all(Path(place).is_relative_to(site_packages(environment)) for place in places)


@pytest.mark.parametrize("snippet", README_SNIPPETS, ids=str)
def test_lines_of_the_readme(snippet: Snippet, environment: Path, tmp_path: Path) -> None:
    run_python(environment, tmp_path, snippet.code)


def test_command(environment: Path, tmp_path: Path) -> None:
    output = run([str(environment / "bin" / "bitlab"), "info"], tmp_path)
    assert "Kernels, best first" in output
    assert "ReferenceKernel" in output


def test_conversion(environment: Path, tmp_path: Path) -> None:
    """The engine without torch."""
    model = tiny("llama", 64)
    hugging_face(tmp_path / "source", model, as_floats(model))
    run([str(environment / "bin" / "bitlab"), "convert", "source", "target"], tmp_path)
    assert (tmp_path / "target/model.safetensors").is_file()


def test_limits(environment: Path, tmp_path: Path) -> None:
    """The bench's shared object, which nothing else loads."""
    code = """
from pathlib import Path

import bitcore, bitlab.cli, bitlayers, bitmodels

assert "bitlab_limits" not in Path("/proc/self/maps").read_text()
from bitlab.bench.limits import supported_paths

assert "float32 baseline" in supported_paths()
assert "bitlab_limits" in Path("/proc/self/maps").read_text()
"""
    run_python(environment, tmp_path, code)


def test_program(environment: Path, tmp_path: Path) -> None:
    """The C++ program of the wheel gives the bits of the Python of the wheel."""
    code = """
from pathlib import Path

import torch

from bitlab.demo.program import find_program, run_program
from bitmodels.mlp import BitMLPConfig, BitMLPModel

model = BitMLPModel(BitMLPConfig(n_layers=2, in_channels=20, hidden_dim=33, out_channels=5)).deploy()
model.save_pretrained("model")
x = torch.randn(7, 20)
y, _ = run_program(Path("model"), x, Path("."))
assert torch.equal(y, model(x))
print(find_program())
"""
    program = run_python(environment, tmp_path, code).strip()
    assert Path(program) == site_packages(environment) / "bitcore" / "bin" / "run_bitmlp"


# --- what it links --------------------------------------------------------------------------------------------------


@pytest.fixture
def library(environment: Path) -> Path:
    return site_packages(environment) / LIBRARY


def test_undefined_symbols(library: Path) -> None:
    """C, the compiler's runtime, and the C functions of torch's stable ABI: nothing of Python, at::, c10::, torch::."""
    lines = run(["nm", "--dynamic", "--undefined-only", str(library)], library.parent).splitlines()
    undefined = [line.split() for line in lines]
    assert undefined
    for kind, name in undefined:
        symbol, _, version = name.partition("@")
        assert not re.match(r"_?Py|_ZNK?2at|_ZNK?3c10|_ZNK?5torch|_ZT[ISV]N(2at|3c10|5torch)", symbol), symbol
        assert not re.match(r"GOMP_|__kmpc_|omp_", symbol), symbol
        stable = symbol.startswith(("aoti_torch_", "torch_"))
        runtime = version.lstrip("@").startswith(("GLIBC", "CXXABI", "GCC"))
        assert stable or runtime or kind == "w", f"{name} is of no library that we link"


@pytest.mark.parametrize("name", [LIMITS, ENGINE])
def test_libraries_without_torch(name: str, environment: Path) -> None:
    library = site_packages(environment) / name
    output = run(["readelf", "--dynamic", "--wide", str(library)], library.parent)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output))
    loader = {each for each in needed if each.startswith("ld-linux")}  # of thread-local variables
    assert needed - loader <= {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}


def test_needed_libraries(library: Path) -> None:
    output = run(["readelf", "--dynamic", "--wide", str(library)], library.parent)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output))
    assert "libtorch_cpu.so" in needed
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    assert "RPATH" not in output
    assert "RUNPATH" not in output


def test_no_second_openmp(environment: Path, tmp_path: Path) -> None:
    """Importing and running the package maps no OpenMP but the one that torch came with."""
    code = """
import json
from pathlib import Path

import torch

def mapped():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "/lib" in line and "omp" in Path(line.split()[-1]).name})

torch.randn(999, 99) @ torch.randn(99, 99)
before = mapped()
from bitlayers import BitLinear

layer = BitLinear(300, 500)
y = layer(torch.randn(64, 300))
y.sum().backward()
layer.deploy()(torch.randn(64, 300))
print(json.dumps([before, mapped()]))
"""
    before, after = json.loads(run_python(environment, tmp_path, code))
    assert len(before) <= 1
    assert after == before


def test_building_it_left_the_tree_alone(wheel: Path) -> None:
    """The shared object in the tree is the one of `make build`: the wheel's is linked in a build folder of its own."""
    assert list((ROOT / "build" / "wheel").rglob("libbitcore_torch.so"))
