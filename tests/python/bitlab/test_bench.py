"""`bitlab bench`: it times the right things, says what follows from the times, and refuses nonsense.

No time is asserted: tests run on machines that do other things as well.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import astuple
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bitcore.config import BitQuantConfig
from bitcore.kernels import KernelRegistry
from bitlab.bench import contenders, limits_library, machine, overhead, report, results, timing, training
from bitlab.bench.contenders import Contender
from bitlab.bench.layer import WEIGHT_SCALE, make_layer, make_x
from bitlab.bench.limits import (
    ROUND_TRIP,
    best_path,
    bound,
    kernel_path,
    peak_sampler,
    round_trip_sampler,
    supported_paths,
    weight_read_samplers,
)
from bitlab.bench.limits_library import STREAMS
from bitlab.bench.options import WEIGHTS, BenchOptions, UsageError
from bitlab.bench.peers import PEERS, Peer, selected
from bitlab.bench.peers.transformers_bitnet import MODULE
from bitlab.bench.results import Case, Limit, Measurement, TrainingMeasurement
from bitlab.cli import main
from bitlab.times import Spread
from support import NATIVE_KERNELS, torch_threads
from user_kernels import CustomKernel, OwnForm, registered

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--shapes", "64x256", "--rows", "1,5", "--threads", "1", "--repetitions", "2", "--in-cache"]
MEASUREMENT_KEYS = {
    *("out_features", "in_features", "rows", "threads", "name", "is_peer", "layout", "activations", "dispatched"),
    *(
        "registered",
        "path",
        "weights",
        "weight_bytes",
        "median_us",
        "p10_us",
        "p90_us",
        "repetitions",
        "gb_per_s",
        "gops",
    ),
    *("limit_us", "limited_by", "percent_of_limit", "times_as_fast_as"),
}
LIMIT_KEYS = {
    *("out_features", "in_features", "rows", "threads"),
    *("name", "unit", "median", "p10", "p90", "repetitions"),
}


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["bench", *TINY, "--output", str(tmp_path), *arguments]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    return found


# --- the whole command ----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = bench(tmp_path)
    assert set(found) == {
        *("machine", "command", "date", "seconds", "settings", "weights_from"),
        *("limits", "measurements", "dispatch", "training", "overhead", "skipped"),
    }
    assert found["machine"]["cpu"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["command"].startswith("bitlab bench --shapes 64x256")
    assert all(set(limit) == LIMIT_KEYS for limit in found["limits"])
    assert all(0 < limit["p10"] <= limit["median"] <= limit["p90"] < math.inf for limit in found["limits"])
    assert {limit["name"] for limit in found["limits"]} >= {"cache read", best_path("int8"), best_path("float32")}

    measured = found["measurements"]
    assert all(set(entry) == MEASUREMENT_KEYS for entry in measured)
    for entry in measured:
        assert 0 < entry["p10_us"] <= entry["median_us"] <= entry["p90_us"]
        assert entry["gops"] == pytest.approx(2 * entry["rows"] * 64 * 256 / entry["median_us"] / 1e3)
        assert entry["gb_per_s"] == pytest.approx(entry["weight_bytes"] / entry["median_us"] / 1e3)
        assert set(entry["times_as_fast_as"]) == {"torch float32", "torch bfloat16", "torch dynamic int8"}
    here = [
        name for name in NATIVE_KERNELS if name.startswith("Int8") and name in KernelRegistry.list_available_kernels()
    ]
    for rows in (1, 5):
        lines = [(e["name"], e["layout"]) for e in measured if e["rows"] == rows and not e["is_peer"]]
        assert lines == [(name, layout) for name in here for layout in ("2bit", "1.6bit")]
    best = KernelRegistry.get_kernel_for_config(BitQuantConfig()).name
    assert {entry["name"] for entry in measured if entry["dispatched"]} == {best}
    if len(here) > 1:
        assert [check["dispatched"] for check in found["dispatch"]] == [best] * 4

    assert (tmp_path / "roofline.png").read_bytes().startswith(PNG)
    output = capsys.readouterr().out
    for text in (*here, "torch bfloat16", "1.6bit", "bitlab bench --shapes 64x256", "bench.json", "roofline.png"):
        assert text in output
    assert torch.get_num_threads() == threads


def test_float32_threads_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the cache, not only one thread, not only int8."""
    monkeypatch.setattr("bitlab.bench.machine.last_level_cache", lambda _: 20_000)
    # Two threads that other processes keep from running side by side have no round trip.
    monkeypatch.setattr("bitlab.bench.limits._round_trip", lambda: [300.0])
    arguments = ["--shapes", "48x80", "--rows", "3", "--threads", "1,2", "--repetitions", "2", "--kernels", "best"]
    arguments += ["--activations", "float32,int8", "--layouts", "2bit", "--peers", "none", "--output", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {limit["name"] for limit in found["limits"]} >= {"memory read", "memory read 2bit"}
    assert [(e["threads"], e["unit"]) for e in found["limits"] if e["name"] == ROUND_TRIP] == [(2, "ns")]
    assert [(e["threads"], e["activations"], e["dispatched"]) for e in found["measurements"]] == [
        *((1, "float32", True), (1, "int8", True)),
        *((2, "float32", True), (2, "int8", True)),
    ]
    assert all(entry["times_as_fast_as"] == {} for entry in found["measurements"])
    assert found["dispatch"] == []


def test_a_layout_that_does_not_exist_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(tmp_path, "--shapes", "16x16", "--peers", "none", "--kernels", "best")
    assert {entry["layout"] for entry in found["measurements"]} == {"2bit"}
    assert [entry["name"] for entry in found["skipped"]] == ["layout 1.6bit at 16 x 16"]
    assert "skipped layout 1.6bit at 16 x 16: " in capsys.readouterr().out


def test_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--shapes", "16x16", "--layouts", "1.6bit", "--peers", "none", "--repetitions", "1"]
    assert main(["bench", *tiny, "--output", str(tmp_path)]) == 2
    assert "nothing to measure at 16 x 16" in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bitlab.bench.plot", raising=False)
    monkeypatch.setattr("bitlab.bench.plot", None, raising=False)
    monkeypatch.delattr("bitlab.bench.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench(tmp_path, "--kernels", "best", "--peers", "none")
    assert not (tmp_path / "roofline.png").exists()
    assert "needs matplotlib" in capsys.readouterr().out


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "0x5"], "0 is below 1"),
        (["--shapes", "5"], "'5' is no shape, expected OUTxIN"),
        (["--shapes", "ax5"], "'a' is no whole number"),
        (["--shapes", "5x5,"], "has an empty item"),
        (["--rows", "-1"], "-1 is below 1"),
        (["--threads", "0"], "0 is below 1"),
        (["--threads", "two"], "'two' is no whole number"),
        (["--layouts", "3bit"], "'3bit' is unknown, expected 2bit, 1.6bit"),
        (["--activations", "int4"], "'int4' is unknown, expected int8, float32"),
        (["--peers", "tensorflow"], "'tensorflow' is unknown, expected torch"),
        (["--repetitions", "0"], "0 is below 1"),
        (["--seconds", "nan"], "nan is not above 0"),
        (["--seconds", "1", "--repetitions", "1"], "not allowed with"),
    ],
)
def test_misuse_of_an_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "NoKernel"], "no kernel is named 'NoKernel'; known: Int8Kernel"),
        (["--kernels", "Float32PortableKernel"], "does not run int8 activations"),
        (["--import", "no_such_module"], "--import no_such_module: No module named"),
    ],
)
def test_misuse_that_only_bitcore_knows(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *TINY, *arguments, "--output", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_kernel_that_this_machine_lacks() -> None:
    lacking = [entry for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"] if not entry["supported"]]
    if not lacking:
        pytest.skip("this CPU runs every kernel")
    with pytest.raises(UsageError, match="which this machine does not have"):
        contenders.choose_kernels(BenchOptions(kernels=(lacking[0]["name"],), activations=("int8", "float32")))


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_registered_kernels_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(CustomKernel), registered(OwnForm):
        found = bench(tmp_path, "--peers", "none", "--rows", "1")
    lines = [(e["name"], e["layout"], e["dispatched"]) for e in found["measurements"] if e["registered"]]
    assert lines == [
        ("OwnForm", "own", True),
        ("CustomKernel", "2bit", False),
        ("CustomKernel", "1.6bit", False),
    ]
    assert {check["layout"]: check["dispatched"] for check in found["dispatch"]} == {
        "2bit": "OwnForm",
        "1.6bit": "OwnForm",
    }
    assert "OwnForm* (registered)" in capsys.readouterr().out


def test_an_imported_module_registers_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_mine.py").write_text(
        "from bitcore.kernels import KernelRegistry\nfrom user_kernels import CustomKernel\n"
        "class Mine(CustomKernel):\n    pass\nKernelRegistry.register(Mine)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        found = bench(tmp_path, "--import", "kernels_of_mine", "--kernels", "Mine", "--peers", "none")
    finally:
        KernelRegistry.unregister("Mine")
        del sys.modules["kernels_of_mine"]
    assert {entry["name"] for entry in found["measurements"]} == {"Mine"}


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("rotated_bytes", [0, 30_000])
def test_kernels_compute_the_layer_from_every_copy(activations: str, rotated_bytes: int) -> None:
    layer, x = make_layer(48, 150, rotated_bytes), make_x(3, 150)
    expected = x.double() @ layer.weight().double().T
    options = BenchOptions(
        kernels=("all", "ReferenceKernel", "TorchKernel"), activations=(activations,), weights=WEIGHTS
    )
    pools, reasons = contenders.layouts_of(layer, ("2bit", "1.6bit"))
    assert not reasons
    assert (len(pools["2bit"].copies) > 1) == (rotated_bytes > 0)
    with torch.inference_mode():
        prepared = contenders.prepare_kernels(layer, contenders.choose_kernels(options), pools, options.weights)
        assert {c.name for c in prepared} >= {"ReferenceKernel", "TorchKernel"}
        assert {c.weights for c in prepared} == set(WEIGHTS)
        for contender, held in prepared.items():
            call = held.bind(x)
            for _ in range(len(pools[contender.layout].copies) + 1):
                error = (call().double() - expected).norm() / expected.norm()
                assert error < (0.02 if activations == "int8" else 1e-6), contender


def test_kernels_go_through_the_copies_together() -> None:
    pool = contenders.pack_copies(make_layer(48, 96, rotated_bytes=5000), "2bit")
    read: list[int] = []

    class Reader(CustomKernel):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            read.append(args[2].data_ptr())
            return args[0]

    prepared = contenders.prepare_kernels(
        make_layer(48, 96, 5000), {"int8": [Reader(), Reader()]}, {"2bit": pool}, ("per_tensor",)
    )
    assert len(prepared) == 1  # One name, one line of the tables.
    (held,) = prepared.values()
    first, second = held.bind(make_x(1, 96)), held.bind(make_x(2, 96))
    for _ in range(len(pool.copies) // 2):
        first()
        second()
    assert read == [copy.data_ptr() for copy in pool.copies[: len(read)]]


def test_every_native_kernel_names_a_loop_of_the_limits() -> None:
    known = set(limits_library.multiply_adds())
    for kernel in KernelRegistry.all_kernels():
        if kernel.name in NATIVE_KERNELS and kernel.name != "ReferenceKernel":
            assert kernel.path in known, kernel.name
            assert kernel_path(kernel, BitQuantConfig()) == kernel.path
            assert kernel.path in supported_paths() or not kernel.is_supported()
    assert kernel_path(CustomKernel(), BitQuantConfig()) == best_path("int8")


# --- peers ------------------------------------------------------------------------------------------------------------


def test_peer_groups() -> None:
    assert [peer.name for peer in selected(("torch",))] == ["torch float32", "torch bfloat16", "torch dynamic int8"]
    assert selected(("none",)) == []
    assert selected(("all",)) == list(PEERS)
    assert {peer.group for peer in PEERS} == {"torch", "onednn", "transformers", "ggml"}


@pytest.mark.medium
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("rotated_bytes", [0, 200_000])
def test_a_peer_computes_the_layer_from_every_copy(peer: Peer, rotated_bytes: int) -> None:
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    layer, x = make_layer(64, 512, rotated_bytes), make_x(5, 512)
    assert peer.refuses(64, 512) is None
    expected = x.double() @ layer.weight().double().T
    with torch.inference_mode(), torch_threads(2):
        held = peer.prepare(layer)
        call = held.bind(x)
        for _ in range(layer.copies(held.weight_bytes) + 1):
            y = call()
            assert y.shape == (5, 64)
            # 8 bits of activations, 7 with reduce_range: a step of 1/64 of the largest of normal values.
            limit = 1e-6 if peer.name == "torch float32" else 0.025
            assert (y.double() - expected).norm() / expected.norm() < limit


class AbsentPeer:
    name, group, family = "absent", "ggml", "int8"

    def missing(self) -> str | None:
        return "it is not installed"


class ChoosyPeer(AbsentPeer):
    name = "choosy"

    def missing(self) -> str | None:
        return None

    def refuses(self, out_features: int, in_features: int) -> str | None:
        return f"{out_features} x {in_features} is not to its taste"


def test_missing_peers_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlab.bench.peers.PEERS", (AbsentPeer(), ChoosyPeer()))
    found = bench(tmp_path, "--peers", "ggml", "--kernels", "best")
    assert found["skipped"] == [
        {"name": "absent", "reason": "it is not installed"},
        {"name": "choosy at 64 x 256", "reason": "64 x 256 is not to its taste"},
    ]
    assert not any(entry["is_peer"] for entry in found["measurements"])
    output = capsys.readouterr().out
    assert "skipped absent: it is not installed" in output
    assert "skipped choosy at 64 x 256: 64 x 256 is not to its taste" in output


def test_what_peers_refuse() -> None:
    refusals = {peer.name: peer.refuses(6, 100) for peer in PEERS}
    assert refusals["transformers BitLinear"] == "out_features 6 is no multiple of 4"
    assert refusals["ggml TQ2_0"] == "in_features 100 is no multiple of 256"
    assert refusals["torch float32"] is None


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_finite(threads: int) -> None:
    data = torch.ones(1 << 20, dtype=torch.uint8)
    with torch_threads(threads):
        for path in supported_paths():
            assert all(0 < value < math.inf for value in peak_sampler(path)())
        for streams in (1, 2, 4, 8):
            assert 0 < limits_library.measure_read(data, streams, 2) < math.inf


@pytest.mark.parametrize("size", [5, 3000, 400_000])  # less than a step, than every stream's step, and neither
def test_reads_of_weights_take_turns(size: int) -> None:
    copies = torch.ones(3, 1, size, dtype=torch.uint8)
    for threads in (1, 2):
        with torch_threads(threads):
            samplers = weight_read_samplers(copies, cycle(range(3)))
            assert set(samplers) == {count for count in STREAMS if 256 * count * threads <= max(size, 256 * threads)}
            assert all(0 < value < math.inf for sampler in samplers.values() for value in sampler())
    turn = cycle(range(3))
    with torch_threads(1):
        reads = len(weight_read_samplers(copies, turn)[1]())
    assert next(turn) == reads % 3  # a read takes the turn that a kernel would have had


def test_round_trip_between_threads() -> None:
    """A time where the threads ran side by side, infinite where other processes kept one of them waiting."""
    with torch_threads(1):
        assert round_trip_sampler() is None
    for threads in (2, 3):  # three: the slowest of two
        with torch_threads(threads):
            assert limits_library.measure_round_trip(1) > 0


@pytest.mark.parametrize("found", [[], [300.0]], ids=["waits", "runs"])
def test_a_round_trip_that_does_not_end_is_left_out(found: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitlab.bench.limits._round_trip", lambda: found)
    with torch_threads(2):
        sampler = round_trip_sampler()
    assert (sampler() if sampler else []) == found


@pytest.mark.medium
def test_round_trip_of_threads_that_do_not_run_side_by_side() -> None:
    program = """
import torch
from bitlab.bench import limits_library
from bitlab.bench.limits import round_trip_sampler
torch.set_num_threads(2)
print(torch.get_num_threads(), limits_library.measure_round_trip(2), round_trip_sampler())
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split() == ["2", "inf", "None"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limits_library.measure_round_trip(0), "repeats is 0, expected at least 1"),
        (lambda: limits_library.measure_round_trip(1), "torch has 1 thread, expected at least 2"),
        (lambda: limits_library.measure_round_trip(10**9), "repeats is 1000000000, expected at most 1000000"),
        (lambda: limits_library.measure_multiply_adds("vfnord", 1), "name is 'vfnord', expected one"),
        (lambda: limits_library.measure_multiply_adds("int16 baseline", 0), "rounds is 0, expected at least 1"),
        (lambda: limits_library.measure_read(torch.ones(9), 1, 1), "data is torch.float32 of strides"),
        (lambda: limits_library.measure_read(torch.ones(9, dtype=torch.uint8), 3, 1), "streams is 3"),
        (lambda: limits_library.measure_read(torch.ones(9, dtype=torch.uint8), 1, 1), "data has 9 bytes"),
        (lambda: limits_library.measure_read(torch.ones(9999, dtype=torch.uint8), 1, 0), "repeats is 0"),
    ],
)
def test_limits_refuse(call: Any, message: str) -> None:
    with torch_threads(1), pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_bound_by_hand() -> None:
    # 1,000 bytes at 10 GB/s take 0.1 us; 4,000 operations at 20 GOPS 0.2 us, at 80 GOPS 0.05 us.
    assert astuple(bound(1000, 4000, 10, 20)) == (pytest.approx(0.2), "arithmetic")
    assert astuple(bound(1000, 4000, 10, 80)) == (pytest.approx(0.1), "memory")


# --- training and overhead --------------------------------------------------------------------------------------------


class FakeAutoBitLinear(torch.nn.Linear):
    def __init__(self, in_features: int, out_features: int, *, bias: bool, online_quant: bool) -> None:
        assert online_quant  # Otherwise it does not quantize its weight.
        super().__init__(in_features, out_features, bias)


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    module.AutoBitLinear = FakeAutoBitLinear  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: {MODULE: module}[name])
    found = bench(tmp_path, "--training", "--threads", "1,2")
    assert found["measurements"] == found["limits"] == found["dispatch"] == found["overhead"] == found["skipped"] == []
    entries = found["training"]
    names = ["BitLinear", "nn.Linear", "plain straight-through", "transformers AutoBitLinear"]
    keys = [(e["threads"], e["rows"], e["precision"], e["name"]) for e in entries]
    precisions = ("float32", "bfloat16 autocast")
    assert keys == [(t, r, p, name) for t in (1, 2) for r in (1, 5) for p in precisions for name in names]
    for entry in entries:
        assert (entry["out_features"], entry["in_features"]) == (64, 256)
        assert 0 < entry["p10_us"] <= entry["median_us"] <= entry["p90_us"]
        assert entry["kept_bytes"] > 0
    output = capsys.readouterr().out
    for text in (*names, "Training: forward + backward, 64 x 256", "bfloat16", "x bytes"):
        assert text in output
    assert not (tmp_path / "roofline.png").exists()


@pytest.mark.parametrize("installed", [False, True])
def test_training_without_transformers(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(importlib, "import_module", lambda _: types.ModuleType("without"))
    layers, reasons = training.available_layers()
    assert list(layers) == ["BitLinear", "nn.Linear", "plain straight-through"]
    (reason,) = reasons.values()
    assert ("cannot be imported" if installed else "is not installed") in reason


def test_bytes_kept_by_hand() -> None:
    """Of 5 rows, 256 in and 64 out."""
    x = make_x(5, 256).requires_grad_()
    kept = {
        name: training.Step(make(64, 256), x, None).kept_bytes() for name, make in list(training.LAYERS.items())[:3]
    }
    # Codes and scales of x, the weight's scale; the weight is a parameter.
    assert kept["BitLinear"] == 5 * 256 + 5 * 4 + 4
    assert kept["nn.Linear"] == 4 * 5 * 256  # x; the weight is a parameter.
    assert kept["plain straight-through"] == 4 * (5 * 256 + 64 * 256)  # Both, fake quantized.
    wide = training.Step(training.LAYERS["nn.Linear"](64, 256), x, torch.bfloat16)
    assert wide.kept_bytes() == 2 * (5 * 256 + 64 * 256)  # Both as copies.


def test_all_layers_of_training_give_gradients_to_x_and_weight() -> None:
    x = make_x(5, 256).requires_grad_()
    torch.manual_seed(0)
    ours = training.LAYERS["BitLinear"](64, 256)
    plain = training.LAYERS["plain straight-through"](64, 256)
    plain.load_state_dict(ours.state_dict())
    gradients = []
    for layer in (ours, plain):
        y = training.Step(layer, x, None).forward()
        gradients.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))))
        assert training.Step(layer, x, None).call()().shape == x.shape
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_training_ratios() -> None:
    def entry(name: str, us: float, kept_bytes: int) -> TrainingMeasurement:
        return TrainingMeasurement(CASE, name, "float32", Spread(us, us, us, 1), kept_bytes)

    found = [entry("A", 10, 100), entry("B", 25, 50)]
    assert results.training_ratios(found, of="A") == {(CASE, "float32", "B"): (2.5, 0.5)}
    assert results.training_ratios(found, of="C") == {}
    nothing_kept = results.training_ratios([entry("A", 10, 0), entry("B", 25, 50)], of="A")
    assert math.isnan(nothing_kept[CASE, "float32", "B"][1])


def test_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(tmp_path, "--overhead")
    entries = found["overhead"]
    assert [(e["mode"], e["name"]) for e in entries] == [
        ("no_grad", "nn.Linear"),
        ("no_grad", "BitLinear, evaluation"),
        ("no_grad", "BitLinear, deployed"),
        ("no_grad", "torch.ops.bitcore.bitlinear"),
        ("forward + backward", "nn.Linear"),
        ("forward + backward", "BitLinear, training"),
        ("forward + backward", "BitLinear, evaluation"),
        ("forward + backward", "BitLinear, deployed"),
    ]
    linear = {e["mode"]: e["median_us"] for e in entries if e["name"] == "nn.Linear"}
    for entry in entries:
        assert entry["above_linear_us"] == pytest.approx(entry["median_us"] - linear[entry["mode"]])
        assert entry["repetitions"] == 2
    assert "above nn.Linear" in capsys.readouterr().out


def test_what_overhead_times() -> None:
    """Only steps record gradients, and every call returns the layer's y."""
    for (mode, name), call in overhead.calls().items():
        y = call()
        assert y.shape == (8, 8), name
        assert y.requires_grad == (mode == "forward + backward"), name


def test_a_dispatch_that_is_slower_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = [measured("A", 10.6, dispatched=True), measured("B", 10.0)]
    found += [measured("A", 14.0, "1.6bit", dispatched=True), measured("B", 10.0, "1.6bit")]
    run = results.Results(machine.describe(), "", "", BenchOptions(), "", measurements=found)
    report.print_dispatch(run, Console(width=120))
    text = " ".join(capsys.readouterr().out.split())
    assert "in 0 of 2 cases the dispatched kernel is at most 5 % slower" in text
    assert "Of the 2 others, 1 may be noise (the middle 80 % of both times overlap); in 1 it is slower" in text


# --- what follows -----------------------------------------------------------------------------------------------------

CASE = Case(out_features=100, in_features=200, rows=3, threads=1)


def contender(name: str, layout: str = "2bit", *, dispatched: bool = False, is_peer: bool = False) -> Contender:
    return Contender(name, is_peer, layout, "" if is_peer else "int8", dispatched, False, "peak")


def measured(name: str, us: float, layout: str = "2bit", *, dispatched: bool = False) -> Measurement:
    spread = Spread(us, 0.95 * us, 1.05 * us, 9)
    return Measurement(CASE, contender(name, layout, dispatched=dispatched), 5000, spread, None)


def test_a_measurement_by_hand() -> None:
    # Of a peak the upper decile counts, of a read the median: 120,000 operations at 60 GOPS take 2 us, 5,000 bytes at 4
    # GB/s 1.25 us.
    limits = {
        "memory read": Limit(CASE, "memory read", Spread(4.0, 3.0, 5.0, 9)),
        "peak": Limit(CASE, "peak", Spread(50.0, 40.0, 60.0, 9)),
    }
    found = results.measurement(CASE, contender("A"), 5000, [8.0, 4.0, 6.0], limits, "memory read")
    assert found.time.median == 6
    assert found.gb_per_s == pytest.approx(5000 / 6 / 1e3)
    assert found.gops == pytest.approx(20.0)
    assert found.bound is not None
    assert astuple(found.bound) == (pytest.approx(2.0), "arithmetic")
    assert found.percent_of_limit == pytest.approx(100 * 2 / 6)
    limits["memory read"] = Limit(CASE, "memory read", Spread(2.0, 1.0, 5.0, 9))
    found = results.measurement(CASE, contender("A"), 5000, [8.0, 4.0, 6.0], limits, "memory read")
    assert found.bound is not None
    assert astuple(found.bound) == (pytest.approx(2.5), "memory")


def test_ratios() -> None:
    found = results.with_ratios([measured("A", 10), measured("torch float32", 40), measured("torch dynamic int8", 5)])
    assert found[0].ratios == {"torch float32": 4.0, "torch dynamic int8": 0.5}


def test_dispatch_checks() -> None:
    found = [measured("A", 10.6, dispatched=True), measured("B", 10.0), measured("C", 90.0)]
    found += [measured("A", 10.4, "1.6bit", dispatched=True), measured("B", 10.0, "1.6bit")]
    first, second = results.dispatch_checks(found)
    assert (first.layout, first.dispatched, first.best) == ("2bit", "A", "B")
    assert first.percent_slower == pytest.approx(6.0)
    assert not first.within_allowance
    assert first.ranges_overlap  # 10.07 to 11.13 and 9.5 to 10.5
    (apart,) = results.dispatch_checks([measured("A", 12.0, dispatched=True), measured("B", 10.0)])
    assert (apart.within_allowance, apart.ranges_overlap) == (False, False)
    assert (second.layout, second.within_allowance) == ("1.6bit", True)
    assert results.dispatch_checks(found[:1]) == []
    assert results.dispatch_checks(found[1:3]) == []


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_machine(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2M", "512")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.last_level_cache(tmp_path) == 2 * 2**20
    shutil.rmtree(tmp_path)
    assert machine.last_level_cache(tmp_path) == machine.ASSUMED_CACHE_BYTES


def test_turns() -> None:
    order: list[str] = []

    def sampler(name: str) -> timing.Sampler:
        def sample() -> list[float]:
            order.append(name)
            return [1.0, 2.0]

        return sample

    found = timing.take_turns({name: sampler(name) for name in "abc"}, repetitions=9, seconds=math.inf)
    assert found == {name: [1.0, 2.0] * 9 for name in "abc"}
    rounds = [tuple(order[start : start + 3]) for start in range(0, 27, 3)]
    assert all(set(names) == set("abc") for names in rounds)
    assert len(set(rounds)) > 1
    order.clear()
    timing.take_turns({"a": sampler("a")}, repetitions=None, seconds=0.0)
    assert len(order) == timing.LEAST_ROUNDS


def test_copies() -> None:
    layer = make_layer(4, 16, rotated_bytes=1000)
    assert layer.copies(100) * 100 > 1000
    assert make_layer(4, 16, rotated_bytes=0).copies(100) == 1
    assert torch.equal(layer.weight() / WEIGHT_SCALE, layer.codes.float())
    assert set(layer.codes.unique().tolist()) == {-1, 0, 1}
