"""Fixtures that walk over kernels, configurations and dtypes; hypothesis' profiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads. Threads that wait give the core away: others want it. Processes beside each other
# share the cores; a test of more threads than one says so.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

import oracle
from bitcore.kernels import KernelRegistry
from oracle import Schema
from support import ALL_KERNELS, FLOAT32_KERNELS, INT8_KERNELS, torch_threads

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.register_profile("explore", deadline=None, database=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# Medium tests alone, of packages that take seconds to import: no quick run even collects them.
SLOW_TO_IMPORT = (
    "test_bring_your_model.py",
    "test_conversion_transformers.py",
    "test_language_model_transformers.py",
    "test_gguf_tokenizer_transformers.py",
    "test_peft.py",
    "test_transformers.py",
    "test_transformers_bitnet.py",
    "test_transformers_packed_embeddings.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """None where pytest decides itself."""
    leaves_out = "not medium" in (config.option.markexpr or "")
    return True if leaves_out and collection_path.name in SLOW_TO_IMPORT else None


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """torch compiles a function anew only so many times: without this, who ran before would decide."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(params=ALL_KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of every kernel that this machine runs, in turn."""
    return str(request.param)


@pytest.fixture(params=INT8_KERNELS)
def int8_kernel(request: pytest.FixtureRequest) -> str:
    """Those of int8 activations."""
    return str(request.param)


@pytest.fixture(params=FLOAT32_KERNELS)
def float32_kernel(request: pytest.FixtureRequest) -> str:
    """Those of float32 activations."""
    return str(request.param)


@pytest.fixture(params=oracle.SCHEMAS, ids=str)
def schema(request: pytest.FixtureRequest) -> Schema:
    """The eight configurations."""
    found = request.param
    assert isinstance(found, Schema)
    return found


@pytest.fixture(params=oracle.INT8_SCHEMAS, ids=str)
def int8_schema(request: pytest.FixtureRequest) -> Schema:
    """The four configurations of int8 activations."""
    found = request.param
    assert isinstance(found, Schema)
    return found


@pytest.fixture(params=oracle.OUTPUT_DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """float32, bfloat16, float16."""
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small steps gain nothing from threads, and lose much where other processes want the cores."""
    with torch_threads(1):
        yield


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Afterwards the kernels that a test has registered are gone."""
    before = KernelRegistry.list_available_kernels()
    yield
    for name in KernelRegistry.list_available_kernels():
        if name not in before:
            KernelRegistry.unregister(name)
