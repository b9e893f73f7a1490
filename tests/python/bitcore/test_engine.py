"""bitcore.engine: the C API through ctypes, on NumPy arrays."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

import oracle
from bitcore import _c_api, engine
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from oracle import Schema
from support import ROOT, config_of

HEADER = ROOT / "bindings/c/bitlab.h"
WEIGHT_SCHEMAS = [Schema("per_tensor", "int8", "per_channel"), Schema("per_channel", "int8", "per_channel")]
SHAPES = [(1, 1), (1, 17), (16, 16), (17, 65), (33, 40), (5, 130)]


def some_codes(rows: int, columns: int) -> oracle.Codes:
    return np.random.default_rng(rows * columns).integers(-1, 2, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing(shape: tuple[int, int]) -> None:
    codes = some_codes(*shape)
    for layout in oracle.layouts_of(shape[1]):
        packed = engine.pack_weights(codes, layout)
        np.testing.assert_array_equal(packed, oracle.pack(codes, layout))
        np.testing.assert_array_equal(engine.unpack_weights(packed, shape[1]), codes)
        assert engine.packed_row_bytes(*shape, layout) == packed.shape[1]


def test_rows_that_lie_apart() -> None:
    codes = some_codes(8, 40)[::2, 3:36]
    np.testing.assert_array_equal(engine.pack_weights(codes, "2bit"), oracle.pack(codes, "2bit"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("schema", WEIGHT_SCHEMAS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_prepare_weights(shape: tuple[int, int], schema: Schema, dtype: str) -> None:
    weight = oracle.round_to(np.random.default_rng(1).standard_normal(shape).astype(np.float32), dtype)
    bits = oracle.float32_to_bfloat16_bits(weight) if dtype == "bfloat16" else weight.astype(dtype)
    scale, packed = engine.prepare_weights(bits, dtype, config_of(schema), "2bit")
    expected = oracle.weight_scale(weight, schema)
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(packed, oracle.pack(oracle.quantize_weight(weight, expected, schema)))


def test_prepare_weights_per_group() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 100)).astype(np.float32)
    scale, packed = engine.prepare_weights(weight, "float32", BitQuantConfig("per_group", group_size=32), "1.6bit")
    assert scale.dtype == np.float16
    assert scale.shape == (5, 4)
    for row, group in np.ndindex(5, 4):
        assert scale[row, group] == oracle.group_scale(weight[row, 32 * group : 32 * group + 32])
    divisors = scale.astype(np.float32).repeat(32, axis=1)[:, :100]
    codes = np.clip(np.rint(weight / divisors), -1, 1).astype(np.int8)
    np.testing.assert_array_equal(packed, oracle.pack(codes, "1.6bit"))


def test_errors_name_the_argument_and_both_values() -> None:
    codes, packed = some_codes(4, 40), engine.pack_weights(some_codes(4, 40), "2bit")
    with pytest.raises(QuantizationError, match=r"-1, 0 and 1 only, got 2 at \(0, 0\)"):
        engine.pack_weights(np.full((1, 1), 2, np.int8), "2bit")
    with pytest.raises(QuantizationError, match=r"layout is '3bit', expected '2bit' or '1.6bit'"):
        engine.pack_weights(codes, "3bit")
    with pytest.raises(QuantizationError, match=r"'1.6bit' does not exist for 16 in_features"):
        engine.packed_row_bytes(1, 16, "1.6bit")
    with pytest.raises(QuantizationError, match="out_features"):
        engine.packed_row_bytes(0, 16, "2bit")
    with pytest.raises(QuantizationError, match=r"has shape \(4,\)"):
        engine.pack_weights(codes[0, :4], "2bit")
    with pytest.raises(QuantizationError, match="strides"):
        engine.pack_weights(codes.T, "2bit")
    with pytest.raises(QuantizationError, match="a matrix of int8 has dtype float32, expected int8"):
        engine.pack_weights(codes.astype(np.float32), "2bit")
    with pytest.raises(QuantizationError, match="checksum"):
        engine.unpack_weights(np.where(np.arange(packed.size).reshape(packed.shape) == 0, packed ^ 1, packed), 40)
    with pytest.raises(QuantizationError, match="in_features"):
        engine.unpack_weights(packed, 39)
    weight = np.full((2, 40), np.nan, np.float32)
    with pytest.raises(QuantizationError, match="weight"):
        engine.prepare_weights(weight, "float32", BitQuantConfig(), "2bit")
    with pytest.raises(QuantizationError, match="dtype is 'float64'"):
        engine.prepare_weights(np.zeros((2, 40)), "float64", BitQuantConfig(), "2bit")


def test_messages_belong_to_their_thread() -> None:
    found: dict[int, str] = {}

    def fail(columns: int) -> None:
        for _ in range(100):
            with pytest.raises(QuantizationError) as error:
                engine.packed_row_bytes(1, columns, "1.6bit")
            assert f" {columns} in_features" in str(error.value)
        found[columns] = str(error.value)

    threads = [threading.Thread(target=fail, args=(columns,)) for columns in (1, 2, 3, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {1, 2, 3, 16}


def test_a_missing_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_c_api, "PATH", tmp_path / "libbitlab.so")
    _c_api.library.cache_clear()
    try:
        with pytest.raises(ImportError, match="engine cannot be loaded .*: run `make build`"):
            engine.packed_row_bytes(1, 1, "2bit")
    finally:
        _c_api.library.cache_clear()


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are missing")
def test_it_exports_the_header_and_nothing_else() -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", _c_api.PATH], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert exported == {name for name in exported if f"{name}(" in HEADER.read_text()}
    assert len(exported) == HEADER.read_text().count("BITLAB_EXPORT ") - 1  # one of them is its definition


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
def test_the_header_is_c() -> None:
    command = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c", str(HEADER)]
    subprocess.run(command, check=True, timeout=60)
