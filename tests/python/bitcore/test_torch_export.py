"""torch.export: a model is exported, saved, and runs in another process that imports only torch and bitcore."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, deploy
from core_helpers import CONFIGS, PER_TOKEN, id_of

pytestmark = pytest.mark.medium

STATES = ("training", "evaluation", "deployed")
ROWS = (0, 1, 2, 9, 64)

OTHER_PROCESS = """
import sys
from pathlib import Path

import torch
import bitcore

for program in sorted(Path(sys.argv[1]).glob("*.pt2")):
    run = torch.export.load(program).module()
    inputs = torch.load(program.with_suffix(".inputs.pt"))
    torch.save([run(x) for x in inputs], program.with_suffix(".outputs.pt"))
assert not {"bitlayers", "bitmodels"} & sys.modules.keys()
"""


class Exported(NamedTuple):
    """One saved program, and what its model returns in eager mode."""

    path: Path
    expected: list[Tensor]


def make_model(config: BitQuantConfig, state: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(37, 24, quant_config=config), nn.ReLU(), BitLinear(24, 5, quant_config=config))
    model.train(state == "training")
    return deploy(model) if state == "deployed" else model


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 37, generator=generator) for rows in ROWS]


def export(model: nn.Module, path: Path, *, strict: bool) -> Exported:
    """Exports with any number of rows and saves program and inputs."""
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (inputs()[-1],), dynamic_shapes=({0: dynamic},), strict=strict)
    torch.export.save(program, path)
    torch.save(inputs(), path.with_suffix(".inputs.pt"))
    return Exported(path, [model(x).detach() for x in inputs()])


def run_elsewhere(folder: Path) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def check(exported: Exported) -> None:
    outputs = torch.load(exported.path.with_suffix(".outputs.pt"))
    for y, expected in zip(outputs, exported.expected, strict=True):
        assert_same_bits(y.detach(), expected, exported.path.name)


def test_every_state_and_config_runs_in_another_process(tmp_path: Path) -> None:
    """Each state strictly and not, and every config deployed; of the two ways to export, dynamo traces the strict."""
    programs = [
        export(make_model(PER_TOKEN, state), tmp_path / f"{state}-{strict}.pt2", strict=strict)
        for state in STATES
        for strict in (False, True)
    ]
    for config in CONFIGS:
        programs.append(export(make_model(config, "deployed"), tmp_path / f"{id_of(config)}.pt2", strict=False))
    run_elsewhere(tmp_path)
    for program in programs:
        check(program)


def test_export_under_autocast_keeps_its_dtype(tmp_path: Path) -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(PER_TOKEN, "deployed")

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.model(x)

    exported = export(Autocast(), tmp_path / "autocast.pt2", strict=False)
    assert {y.dtype for y in exported.expected} == {torch.bfloat16}
    run_elsewhere(tmp_path)
    check(exported)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_still_trains(strict: bool) -> None:
    """The graph of a training mode model carries the straight-through gradients."""
    model = make_model(PER_TOKEN, "training")
    x = inputs()[-1]
    program = torch.export.export(model, (x,), strict=strict).module()
    program(x).square().sum().backward()
    exported = {name: parameter.grad for name, parameter in program.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = exported[name]
        assert gradient is not None
        assert parameter.grad is not None
        assert_same_bits(gradient, parameter.grad, name)


def test_a_deployed_program_holds_packed_weights_only() -> None:
    program = torch.export.export(make_model(PER_TOKEN, "deployed"), (inputs()[-1],))
    sizes = {name: tensor.dtype for name, tensor in program.state_dict.items()}
    assert sizes == {
        "0.bias": torch.float32,
        "0.qweight": torch.uint8,
        "0.qweight_scale": torch.float32,
        "2.bias": torch.float32,
        "2.qweight": torch.uint8,
        "2.qweight_scale": torch.float32,
    }
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {"bitcore.bitlinear.default", "aten.relu.default"}
