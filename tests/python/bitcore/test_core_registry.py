"""The registry: built-in kernels, naming them, forcing them, the environment variable."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bad_tensors import expect
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels import BitKernelBase, KernelRegistry, TorchKernel
from bitcore.kernels.builtin import BUILTIN_KERNELS, FAMILY_NAMES
from bitcore.kernels.registry import selection
from bitcore.ops import bitlinear
from bitcore.testing import assert_same_bits, check_kernel
from core_helpers import CONFIGS, PER_TOKEN, id_of, make_layer
from oracle import Schema
from support import ALL_KERNELS, LACKING_KERNELS, NATIVE_KERNELS, config_of, covers, make_linear, proves
from user_kernels import CustomKernel, infer

pytestmark = pytest.mark.usefixtures("clean_registry")
all_configs = pytest.mark.parametrize("config", CONFIGS, ids=id_of)
SUPPORTED = [kernel for kernel in BUILTIN_KERNELS if kernel.is_supported()]


# ---- built-in kernels ------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kernel", SUPPORTED, ids=lambda kernel: kernel.name)
def test_every_built_in_kernel_keeps_the_contract(kernel: BitKernelBase) -> None:
    check_kernel(kernel)


BUILT_IN = {
    "Int8Avx512VbmiKernel",
    "Int8Avx512VnniKernel",
    "Int8AvxVnniKernel",
    "Int8Avx2Kernel",
    "Int8PortableKernel",
    "Float32Avx512Kernel",
    "Float32Avx2Kernel",
    "Float32PortableKernel",
    "ReferenceKernel",
}


def test_built_in_kernels_are_listed() -> None:
    assert set(NATIVE_KERNELS) >= BUILT_IN
    available = KernelRegistry.list_available_kernels()
    assert {"Int8Kernel", "Float32Kernel", "ReferenceKernel", "TorchKernel"} <= set(available)
    assert len(available) == len(set(available))
    for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"]:
        assert (entry["name"] in available) == entry["supported"], entry


def test_kernels_that_need_another_machine() -> None:
    """Skipped where there are any, so that the summary of every run names what it did not run."""
    if LACKING_KERNELS:
        pytest.skip(f"this CPU lacks what these need: {', '.join(LACKING_KERNELS)}")


def test_best_kernel_is_the_first_that_fits(schema: Schema) -> None:
    names = [name for name in KernelRegistry.list_available_kernels() if name not in ("Int8Kernel", "Float32Kernel")]
    best = next(name for name in names if covers(name, schema))
    found = KernelRegistry.get_kernel_for_config(config_of(schema))
    assert found.name == best
    case = make_linear(3, 18, 40)
    scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, qweight_scale=scale, qweight=qweight, quant_config=config_of(schema))
    with proves(best):
        bitlinear.forward(case.x, weight=case.weight, quant_config=config_of(schema), training=True)


@all_configs
def test_every_config_has_a_bound_kernel(config: BitQuantConfig) -> None:
    best = KernelRegistry.get_kernel_for_config(config)
    family = "Int8Kernel" if config.activation_dtype == "int8" else "Float32Kernel"
    assert best.name == KernelRegistry.get_kernel_by_name(family, config).name == FAMILY_NAMES[family]
    assert best.quant_config == config
    assert KernelRegistry.get_kernel_for_config(config, "cuda:1").name == "TorchKernel"
    layer = make_layer(5)
    scale, qweight = best.prepare_weights(layer.weight, config)
    assert_same_bits(best(layer.x, scale, qweight, layer.bias), infer(config))
    with pytest.raises(QuantizationError, match="quant_config"):
        TorchKernel()(layer.x, scale, qweight)


def test_kernels_that_cannot_be_had() -> None:
    for name, words in (("Int9Kernel", "known"), ("Float32Kernel", "does not cover")):
        with pytest.raises(KernelNotFoundError, match=words):
            KernelRegistry.get_kernel_by_name(name, PER_TOKEN)
    with pytest.raises(KernelNotFoundError, match="'foo'"):
        KernelRegistry.get_kernel_for_config(PER_TOKEN, "foo")
    with pytest.raises(KernelNotFoundError, match="Int9Kernel"):
        KernelRegistry.unregister("Int9Kernel")
    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.unregister("ReferenceKernel")
    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.register(type("ReferenceKernel", (CustomKernel,), {}))
    assert "ReferenceKernel" in KernelRegistry.list_available_kernels()
    with pytest.raises(KernelNotFoundError, match="Int9Kernel"), KernelRegistry.forced("Int9Kernel"):
        pass
    with KernelRegistry.forced("Float32PortableKernel"), pytest.raises(KernelNotFoundError, match="BitQuantConfig"):
        infer()
    with KernelRegistry.forced("TorchKernel", "ReferenceKernel"), pytest.raises(KernelNotFoundError, match="more than"):
        infer()
    infer()


@pytest.mark.parametrize("name", ALL_KERNELS)
def test_kernel_that_does_not_fit_is_refused(name: str) -> None:
    for config in CONFIGS:
        if not covers(name, Schema(activation_dtype=config.activation_dtype)):
            with pytest.raises(KernelNotFoundError, match=name):
                KernelRegistry.get_kernel_by_name(name, config)
            with pytest.raises(KernelNotFoundError), KernelRegistry.forced(name):
                infer(config)


def test_a_kernel_that_this_machine_lacks() -> None:
    if not LACKING_KERNELS:
        pytest.skip("this machine runs every kernel")
    entries = {entry["name"]: entry for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"]}
    for name in LACKING_KERNELS:
        config = BitQuantConfig(activation_dtype="int8" if covers(name, Schema()) else "float32")
        words = f"{name} {entries[name]['requirement']}"
        expect(KernelNotFoundError, words, partial(KernelRegistry.get_kernel_by_name, name, config))


def _kernel_name() -> str:
    return KernelRegistry.get_kernel_for_config(PER_TOKEN).name


def test_forced_blocks_may_end_in_any_order() -> None:
    automatic = _kernel_name()
    first, second, third = (KernelRegistry.forced(name) for name in ("TorchKernel", "ReferenceKernel", "TorchKernel"))
    for block in (first, second, third):
        block.__enter__()
    third.__exit__(None, None, None)
    assert _kernel_name() == "ReferenceKernel"
    first.__exit__(None, None, None)
    assert _kernel_name() == "ReferenceKernel"
    second.__exit__(None, None, None)
    assert _kernel_name() == automatic
    assert selection() == ""


def test_a_call_sees_one_state_of_the_registry() -> None:
    stop = threading.Event()

    def force() -> None:
        while not stop.is_set():
            with KernelRegistry.forced("ReferenceKernel"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            forcing = pool.submit(force)
            try:
                names = {_kernel_name() for _ in range(20_000)}
            finally:
                stop.set()
            forcing.result()
    finally:
        sys.setswitchinterval(interval)
    assert names <= {"ReferenceKernel", FAMILY_NAMES["Int8Kernel"]}


# ---- the environment variable ----------------------------------------------------------------------------------------

_SCRIPT = """
import json
import torch
from bitcore import BitQuantConfig, KernelNotFoundError, KernelRegistry
from bitcore.ops import bitlinear

def outcome(dtype, training):
    config = BitQuantConfig("per_tensor", dtype, "per_channel")
    try:
        name = KernelRegistry.get_kernel_for_config(config).name
        weight = torch.ones(3, 5)
        scale, qweight = bitlinear.prepare_weights(weight, config)
        bitlinear.forward(torch.ones(2, 5), weight, scale, qweight, None, config, training)
    except KernelNotFoundError as error:
        return str(error)
    tiles = torch.ops.bitcore.kernel_tile_calls(name) if name != "TorchKernel" else -1
    return [name, tiles]

print(json.dumps([outcome(dtype, training) for dtype in ("int8", "float32") for training in (False, True)]))
"""


def _with_variable(value: str) -> list[Any]:
    environment = {**os.environ, "BITLAB_KERNEL": value, "PYTHONPATH": str(Path(__file__).parents[3] / "python")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return list(json.loads(done.stdout))


@pytest.mark.medium
def test_the_variable_governs_inference_and_training() -> None:
    results = _with_variable("ReferenceKernel")
    assert all(isinstance(result, list) and result[0] == "ReferenceKernel" for result in results)
    tiles = [result[1] for result in results]
    assert tiles == sorted(set(tiles)), "a call ran on another kernel"
    assert _with_variable("TorchKernel") == [["TorchKernel", -1]] * 4


@pytest.mark.medium
def test_the_variable_names_one_kernel_for_each_activation_dtype() -> None:
    int8, _, float32, _ = _with_variable("Int8PortableKernel, Float32PortableKernel")
    assert int8[0] == "Int8PortableKernel"
    assert float32[0] == "Float32PortableKernel"


@pytest.mark.medium
def test_a_call_that_no_named_kernel_covers() -> None:
    int8, _, float32, _ = _with_variable("Float32PortableKernel")
    assert isinstance(int8, str)
    assert "BITLAB_KERNEL" in int8
    assert "activation_dtype='int8'" in int8
    assert float32[0] == "Float32PortableKernel"
    for wrong in ("Int9Kernel", "Int8PortableKernel,Int8Kernel"):
        assert all("BITLAB_KERNEL" in str(result) for result in _with_variable(wrong)[:2])
