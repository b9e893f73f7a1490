"""The C++ program runs any saved BitMLP, with the bits of Python, and refuses what is damaged."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError
from bitlab.demo.program import find_program, run_program
from bitlayers import BitLinear
from bitmodels import BitMLPConfig, BitMLPModel
from core_helpers import CONFIGS, id_of
from support import INT8_KERNELS, same_bits

PER_CHANNEL = BitQuantConfig("per_channel", "int8", "per_channel")
SHAPES = [(1, 1, 9, 1), (1, 17, 9, 33), (2, 64, 16, 10), (5, 3, 130, 7), (3, 300, 65, 2)]


def make_model(sizes: tuple[int, int, int, int], config: BitQuantConfig, bias: bool = True) -> BitMLPModel:
    torch.manual_seed(sum(sizes))
    return BitMLPModel(BitMLPConfig(*sizes, bias=bias), config).eval()


def layer_of(model: BitMLPModel, index: int) -> BitLinear:
    layer = model.layers[index]
    assert isinstance(layer, BitLinear)
    return layer


@torch.no_grad()
def check(model: BitMLPModel, x: Tensor, folder: Path, threads: int = 1, kernel: str | None = None) -> None:
    model.save_pretrained(folder)
    output, line = run_program(folder, x, folder, threads, kernel)
    assert same_bits(output, model(x).float())
    assert line.startswith(f"{len(x)} rows through {len(model.layers)} layers")
    assert f"threads: {threads}" in line
    if kernel:
        assert kernel in line


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("bias", [False, True])
def test_every_config_with_and_without_bias(config: BitQuantConfig, bias: bool, tmp_path: Path) -> None:
    check(make_model((3, 50, 37, 11), config, bias).deploy(), torch.randn(9, 50), tmp_path)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_other_widths_and_depths(sizes: tuple[int, int, int, int], threads: int, tmp_path: Path) -> None:
    check(make_model(sizes, PER_CHANNEL).deploy(), torch.randn(21, sizes[1]), tmp_path, threads)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, tmp_path: Path) -> None:
    check(make_model((2, 20, 8, 3), PER_CHANNEL).deploy(), torch.randn(rows, 20), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    check(make_model((3, 50, 37, 11), PER_CHANNEL).to(dtype).deploy(), torch.randn(9, 50).to(dtype), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_not_deployed(dtype: torch.dtype, tmp_path: Path) -> None:
    check(make_model((3, 50, 37, 11), PER_CHANNEL).to(dtype), torch.randn(9, 50).to(dtype), tmp_path)


@pytest.mark.parametrize("deployed", [False, True])
def test_layers_with_configs_of_their_own(deployed: bool, tmp_path: Path) -> None:
    model = make_model((3, 50, 37, 11), PER_CHANNEL)
    layer_of(model, 1).quant_config = BitQuantConfig("per_tensor", "float32")
    layer_of(model, 2).quant_config = BitQuantConfig("per_tensor", "int8", "per_tensor")
    check(model.deploy() if deployed else model, torch.randn(9, 50), tmp_path)


@pytest.mark.parametrize("deployed", [False, True])
def test_tied_layers(deployed: bool, tmp_path: Path) -> None:
    model = make_model((4, 37, 37, 11), PER_CHANNEL)
    model.layers[2].weight = model.layers[1].weight
    if deployed:
        model.layers[2] = model.layers[1]
    check(model.deploy() if deployed else model, torch.randn(9, 37), tmp_path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    x = torch.randn(4, 50)
    x[1, 7], x[2, 3] = torch.nan, torch.inf
    check(make_model((3, 50, 37, 11), PER_CHANNEL).deploy(), x, tmp_path)


@pytest.mark.parametrize("kernel", [name for name in INT8_KERNELS if name not in ("TorchKernel", "Int8Kernel")])
def test_every_kernel(kernel: str, tmp_path: Path) -> None:
    check(make_model((3, 50, 37, 11), PER_CHANNEL).deploy(), torch.randn(9, 50), tmp_path, kernel=kernel)


def test_a_path_to_the_file_itself(tmp_path: Path) -> None:
    model = make_model((2, 20, 8, 3), PER_CHANNEL).deploy()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 20)
    assert same_bits(run_program(tmp_path / "model.safetensors", x, tmp_path)[0], model(x).detach())


# --- refusals -------------------------------------------------------------------------------------------------------


def run_raw(*arguments: object) -> tuple[int, str]:
    done = subprocess.run([find_program(), *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_model((2, 20, 8, 3), PER_CHANNEL).deploy().save_pretrained(tmp_path)
    save_file({"x": torch.randn(2, 20)}, tmp_path / "x.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "usage"),
        (["a", "b"], "usage"),
        (["a", "b", "c", "--threads"], "--threads needs a value"),
        (["a", "b", "c", "--threads", "0"], '--threads is "0"'),
        (["a", "b", "c", "--threads", "two"], '--threads is "two"'),
        (["a", "b", "--bogus"], "unknown option --bogus"),
    ],
)
def test_wrong_arguments(options: list[str], message: str) -> None:
    code, error = run_raw(*options)
    assert code == 1
    assert message in error


def test_files_that_are_missing_or_no_safetensors(saved: Path) -> None:
    assert run_raw(saved / "nothing", saved / "x.safetensors", saved / "y")[0] == 1
    assert run_raw(saved, saved / "nothing", saved / "y")[0] == 1
    code, error = run_raw(saved / "config.json", saved / "x.safetensors", saved / "y")
    assert code == 1
    assert "config.json" in error
    code, error = run_raw(saved, saved / "x.safetensors", saved / "no" / "folder")
    assert code == 1
    assert "cannot be written" in error
    code, error = run_raw(saved, saved / "model.safetensors", saved / "y")
    assert code == 1
    assert "x" in error
    code, error = run_raw(saved / "x.safetensors", saved / "x.safetensors", saved / "y")
    assert code == 1
    assert "no saved BitMLPModel" in error


def test_a_truncated_and_a_damaged_model(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    offset = whole.rindex(b"BITLABQW") - 10  # In the payload before a trailer.
    for damaged in (whole[:-5], whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]):
        path.write_bytes(damaged)
        code, error = run_raw(saved, saved / "x.safetensors", saved / "y")
        assert code == 1
        assert error.startswith("run_bitmlp: ")
    assert not (saved / "y").exists()


def test_an_input_of_another_width_and_an_unknown_kernel(saved: Path) -> None:
    with pytest.raises(BitLabError, match="21.*20|20.*21"):
        run_program(saved, torch.zeros(2, 21), saved)
    with pytest.raises(BitLabError, match="NoKernel"):
        run_program(saved, torch.zeros(2, 20), saved, kernel="NoKernel")
    with pytest.raises(BitLabError, match="Float32PortableKernel"):
        run_program(saved, torch.zeros(2, 20), saved, kernel="Float32PortableKernel")


def test_metadata_that_does_not_fit_the_tensors(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    metadata = {"model_type": "BitMLPModel", **BitMLPConfig(2, 20, 8, 3, quant_config=PER_CHANNEL).to_metadata()}
    wrong = {"hidden_dim": "9", "n_layers": "3", "in_channels": "19", "quant_config.weight_granularity": "per_tensor"}
    for name, value in {**wrong, "model_type": "Other", "bias": "yes", "quant_config.activation_dtype": "int4"}.items():
        save_file(tensors, saved / "model.safetensors", {**metadata, name: value})
        assert run_raw(saved, saved / "x.safetensors", saved / "y")[0] == 1, name
    save_file(tensors, saved / "model.safetensors", metadata)
    assert run_raw(saved, saved / "x.safetensors", saved / "y")[0] == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.bias", torch.tensor([1.0, torch.nan, 1.0]), "bias': bias holds NaN or infinity"),
        ("layers.1.bias", torch.tensor([1.0, -torch.inf, 1.0]).bfloat16(), "bias': bias holds NaN or infinity"),
        ("layers.1.bias", torch.tensor([1.0, torch.inf, 1.0]).half(), "bias': bias holds NaN or infinity"),
        ("layers.1.bias", torch.zeros(3, dtype=torch.float64), "F64"),
        ("layers.1.bias", torch.zeros(4), "layers.1.bias': bias has 4 elements, expected 3"),
        ("layers.1.qweight_scale", torch.tensor([1.0, 0.0, 1.0]), "layers.1.qweight_scale': qweight_scale holds 0"),
    ],
)
def test_values_that_no_model_has(saved: Path, name: str, value: Tensor, message: str) -> None:
    path = saved / "model.safetensors"
    metadata = {"model_type": "BitMLPModel", **BitMLPConfig(2, 20, 8, 3, quant_config=PER_CHANNEL).to_metadata()}
    save_file({**load_file(path), name: value}, path, metadata)
    code, error = run_raw(saved, saved / "x.safetensors", saved / "y")
    assert code == 1
    assert message in error
