"""The demo itself, shortened: it passes when all is well, and fails when something is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitcore.exceptions import BitLabError
from bitlab.cli import main
from bitlab.demo import evaluation, program
from bitlab.demo.checks import Checks
from bitlab.demo.data import load
from bitlab.demo.timing import SHAPES, Timing, find
from bitlab.times import Spread, format_spread, format_us, spread

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.medium
def test_one_seed_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seeds", "1", "--skip-timing", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_accuracy_percent"]["packed"][0] >= 95
    assert results["test_accuracy_percent"]["packed"] == results["test_accuracy_percent"]["training_mode"]
    assert results["file_bytes"]["ternary"] < results["file_bytes"]["float_model"] / 8
    assert (tmp_path / "ternary" / "model.safetensors").stat().st_size == results["file_bytes"]["ternary"]
    assert all(check["passed"] for check in results["checks"])
    assert sum("C++ program" in check["claim"] for check in results["checks"]) >= 1
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert str(tmp_path / "demo.png") in capsys.readouterr().out.replace("\n", "")


@pytest.mark.medium
def test_an_untrained_network_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--skip-timing", "--output", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def other_bits(*arguments: object) -> tuple[torch.Tensor, str]:
    output, line = original_run(*arguments)  # type: ignore[arg-type]
    return torch.nextafter(output, output + 1), line


original_run = program.run_program


def missing_program(*_: object) -> tuple[torch.Tensor, str]:
    raise BitLabError("the C++ program is missing")


@pytest.mark.medium
@pytest.mark.parametrize("replacement", [other_bits, missing_program])
def test_a_cpp_program_that_differs_or_is_missing_fails(
    replacement: Callable[..., tuple[torch.Tensor, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlab.demo.main.run_program", replacement)
    monkeypatch.setattr(evaluation, "LOWEST_ACCURACY", 0.0)  # What one epoch cannot reach must not fail instead.
    monkeypatch.setattr(evaluation, "LARGEST_GAP", 100.0)
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--skip-timing", "--output", str(tmp_path)]) == 1
    checks = json.loads((tmp_path / "results.json").read_text())["checks"]
    failed = [check["claim"] for check in checks if not check["passed"]]
    assert failed == [check["claim"] for check in checks if "C++ program" in check["claim"]]
    assert failed


def test_the_splits_are_fixed_and_do_not_overlap() -> None:
    digits, again = load(), load()
    assert len(digits.test) == 450
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    assert torch.equal(digits.test.x, again.test.x)
    assert torch.equal(digits.train.y, again.train.y)
    assert digits.train.x.min() == 0
    assert digits.train.x.max() == 1
    counts = torch.bincount(digits.test.y)
    assert counts.max() - counts.min() <= 3


def test_checks_compare_bits() -> None:
    checks = Checks()
    checks.same_bits("same", torch.tensor([1.0]), torch.tensor([1.0]))
    assert checks.all_passed
    checks.same_bits("signed zero", torch.tensor([0.0]), torch.tensor([-0.0]))
    checks.same_bits("shape", torch.zeros(2), torch.zeros(3))
    assert [check.passed for check in checks.results] == [True, False, False]
    assert not checks.all_passed


def test_timings_are_found_and_formatted() -> None:
    timing = Timing("BitLinear", *SHAPES[0], 1, 52.4, 50, 60, 10, "from memory")
    assert find([timing], SHAPES[0], 1) == {"BitLinear": timing}
    assert find([timing], SHAPES[1], 1) == {}
    assert [format_us(us) for us in (52.4, 7300)] == ["52 us", "7.3 ms"]
    assert format_spread(52.4, 49.6, 60) == "52 us (50 - 60)"
    assert format_spread(7300, 7000, 8000) == "7.3 ms (7.0 - 8.0)"


def test_spread() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([float(i) for i in range(10, -1, -1)]) == Spread(5.0, 1.0, 9.0, 11)
