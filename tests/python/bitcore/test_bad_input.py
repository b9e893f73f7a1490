"""Bad input of every public function: the documented error, which names the argument and both values.

One table per function; what holds for every function and argument (None, kinds of tensors, devices, widths) is below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from bad_tensors import BAD, expect, expect_named
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.ops import base, bitlinear
from core_helpers import PER_TOKEN, id_of, make_layer
from oracle import Schema
from support import assert_same_bits, config_of, make_linear, to_codes
from user_kernels import PATHS

M, N, K = 4, 19, 37
TOO_WIDE = 2**24
PER_CHANNEL = BitQuantConfig("per_channel", "int8", "per_channel")
FLOAT32 = BitQuantConfig("per_tensor", "float32", "per_channel")
X, WEIGHT, BIAS = make_layer(M)
SCALE, QWEIGHT = bitlinear.prepare_weights(WEIGHT, PER_TOKEN)
CODES = bitlinear.unpack_weights(QWEIGHT, K)
QX, X_SCALE = torch.ones(M, K, dtype=torch.int8), torch.ones(M, 1)

Arguments = dict[str, Any]
FUNCTIONS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    "forward, training": (bitlinear.forward, {"x": X, "weight": WEIGHT, "bias": BIAS, "training": True}),
    "forward": (bitlinear.forward, {"x": X, "qweight_scale": SCALE, "qweight": QWEIGHT, "bias": BIAS}),
    "prepare_weights": (bitlinear.prepare_weights, {"weight": WEIGHT}),
    "pack_weights": (bitlinear.pack_weights, {"qweight": CODES}),
    "unpack_weights": (bitlinear.unpack_weights, {"qweight": QWEIGHT, "in_features": K}),
    "check_qweight": (bitlinear.check_qweight, {"qweight": QWEIGHT, "in_features": K}),
    "repack": (bitlinear.repack, {"qweight": QWEIGHT, "in_features": K, "layout": "2bit"}),
    "compute_weight_scale": (base.compute_weight_scale, {"weight": WEIGHT}),
    "quantize_weight": (base.quantize_weight, {"weight": WEIGHT, "scale": SCALE}),
    "dequantize_weight": (base.dequantize_weight, {"qweight": CODES, "scale": SCALE}),
    "fake_quantize_weight": (base.fake_quantize_weight, {"weight": WEIGHT}),
    "compute_x_scale": (base.compute_x_scale, {"x": X}),
    "quantize_x": (base.quantize_x, {"x": X, "scale": X_SCALE}),
    "dequantize_x": (base.dequantize_x, {"qx": QX, "scale": X_SCALE}),
    "fake_quantize_x": (base.fake_quantize_x, {"x": X}),
}
"""Each with arguments that work; quant_config, where it takes one, is PER_TOKEN."""

PACKING = ("pack_weights", "unpack_weights", "check_qweight", "repack")
READERS = PACKING[1:]
"""The functions that read every byte of a packed weight."""


def call_of(name: str, **changes: Any) -> Callable[[], Any]:
    """A call that would work but for `changes`."""
    function, arguments = FUNCTIONS[name]
    config = {} if name in PACKING else {"quant_config": PER_TOKEN}
    return partial(function, **{**arguments, **config, **changes})


def tensors_of(name: str) -> list[str]:
    return [argument for argument, value in FUNCTIONS[name][1].items() if isinstance(value, Tensor)]


def test_calls_work_unless_changed() -> None:
    for name in FUNCTIONS:
        call_of(name)()


# --- the tables -----------------------------------------------------------------------------------------------------

Row = tuple[Arguments, str]
"""What to change, and the words of the error."""


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def one_of_rows(index: int, value: float) -> Tensor:
    return ones(N).index_fill(0, torch.tensor(index), value)


def packed(n: int, k: int) -> Tensor:
    codes = np.random.default_rng([81, n, k]).integers(-1, 2, (n, k)).astype(np.int8)
    return torch.from_numpy(oracle.pack(codes))


FORWARD: list[Row] = [
    ({"x": X.numpy()}, "x ndarray"),
    ({"x": [[1.0]]}, "x"),
    ({"x": torch.tensor(1.0)}, "x"),
    ({"x": ones(M, 36)}, "x 36 37"),
    ({"x": ones(2, M, 53)}, "x 53 37"),
    ({"x": ones(41)}, "x 41 37"),
    ({"x": ones(0, 41)}, "x 41 37"),
    ({"x": ones(M, K, dtype=torch.int8)}, "x int8 float32"),
    ({"x": ones(M, K, dtype=torch.float64)}, "x float64 float32"),
    ({"bias": ones(18)}, "bias 18 19"),
    ({"bias": ones(1)}, "bias 1 19"),
    ({"bias": torch.tensor(1.0)}, "bias 19"),
    ({"bias": ones(1, 19)}, "bias 19"),
    ({"bias": ones(19, dtype=torch.int32)}, "bias int32 float32"),
    ({"bias": ones(19, dtype=torch.float64)}, "bias float64 float32"),
]
SCALES: list[Row] = [
    ({"qweight_scale": torch.tensor(0.0)}, "qweight_scale 0"),
    ({"qweight_scale": torch.tensor(-0.5)}, "qweight_scale -0.5"),
    ({"qweight_scale": torch.tensor(torch.nan)}, "qweight_scale nan"),
    ({"qweight_scale": torch.tensor(torch.inf)}, "qweight_scale inf"),
    ({"qweight_scale": ones(N)}, "qweight_scale 19 per_tensor"),
    ({"qweight_scale": ones(0)}, "qweight_scale 0"),
    ({"qweight_scale": torch.tensor(1)}, "qweight_scale int64 float32"),
    ({"qweight_scale": torch.tensor(1.0).double()}, "qweight_scale float64 float32"),
    ({"qweight_scale": torch.tensor(1.0).bfloat16()}, "qweight_scale bfloat16 float32"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": torch.tensor(1.0)}, "qweight_scale 19"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": ones(18)}, "qweight_scale 18 19"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": ones(1, N)}, "qweight_scale 19"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": one_of_rows(17, 0.0)}, "qweight_scale 0"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": one_of_rows(17, -0.25)}, "qweight_scale -0.25"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": one_of_rows(18, torch.nan)}, "qweight_scale nan"),
    ({"quant_config": PER_CHANNEL, "qweight_scale": one_of_rows(0, torch.inf)}, "qweight_scale inf"),
]
PACKED: list[Row] = [
    ({"qweight": QWEIGHT.flatten()}, "qweight"),
    ({"qweight": QWEIGHT[None]}, "qweight"),
    ({"qweight": QWEIGHT[:, :-1]}, "qweight 15"),
    ({"qweight": torch.cat([QWEIGHT, QWEIGHT[:, :1]], dim=1)}, "qweight 17"),
    ({"qweight": QWEIGHT[:-1]}, "qweight"),
    ({"qweight": torch.cat([QWEIGHT, QWEIGHT[:1]])}, "qweight"),
    ({"qweight": QWEIGHT[:0]}, "qweight"),
    ({"qweight": packed(N, 40)}, "37 40"),  # Of as many bytes.
    ({"qweight": packed(N, 100)}, "37 100"),
    ({"qweight": QWEIGHT.int()}, "qweight int32 uint8"),
    ({"qweight": QWEIGHT.float()}, "qweight float32 uint8"),
]
OTHER_IN_FEATURES: list[Row] = [
    ({"in_features": value}, f"in_features {value}") for value in (-1, 0, 36, 38, 48, TOO_WIDE, 2**62)
]
SCALES_OF_X: list[Row] = [
    ({"scale": ones(5, 1)}, "scale 5 4"),
    ({"scale": ones(K)}, "scale 37 4"),
    ({"scale": ones(M, K, 1)}, "scale"),
    ({"scale": ones(M)}, "scale"),
    ({"scale": ones(M, 1, dtype=torch.float64)}, "scale float64 float32"),
    ({"quant_config": FLOAT32, "scale": ones(M, K, 1)}, "scale"),
    ({"quant_config": FLOAT32, "scale": ones(M)}, "scale"),
    ({"quant_config": FLOAT32, "scale": ones(M, 1, dtype=torch.float64)}, "scale float64 float32"),
]
NOT_A_WEIGHT: list[Row] = [
    ({"weight": ones(K)}, "weight 1"),
    ({"weight": ones(1, N, K)}, "weight 3"),
    ({"weight": ones(N, K, dtype=torch.int8)}, "weight int8 float32"),
    ({"weight": ones(N, K, dtype=torch.float64)}, "weight float64 float32"),
]
NOT_AN_X: list[Row] = [
    ({"x": ones(M, K, dtype=torch.int32)}, "x int32 float32"),
    ({"quant_config": FLOAT32, "x": ones(M, K, dtype=torch.int64)}, "x int64 float32"),
]
TABLES: dict[str, list[Row]] = {
    "forward, training": [
        *FORWARD,
        *NOT_A_WEIGHT,
        ({"weight": ones(N, 38), "bias": None}, "x 37 38"),
        ({"weight": ones(0, K), "bias": None}, "weight 0 1"),
    ],
    "forward": [
        *FORWARD,
        *SCALES,
        *(({**change, "bias": None}, words) for change, words in PACKED),
        ({"qweight": ones(N, 38, dtype=torch.int8)}, "x 37 38"),
        ({"qweight": torch.full((N, K), 2, dtype=torch.int8)}, "qweight 2"),
        ({"qweight": torch.full((N, K), -128, dtype=torch.int8)}, "qweight -128"),
        ({"qweight_scale": None, "qweight": None, "weight": WEIGHT}, "None training=False"),
    ],
    "prepare_weights": [
        *NOT_A_WEIGHT,
        ({"weight": ones(N, K, dtype=torch.uint8)}, "weight uint8"),
        ({"weight": ones(0, K)}, "weight 0 1"),
        ({"weight": ones(N, 0)}, "weight 0 1"),
        ({"layout": "3bit"}, "layout 3bit 2bit"),
    ],
    "pack_weights": [
        ({"qweight": ones(N, K)}, "qweight float32 int8"),
        ({"qweight": ones(N, K, dtype=torch.int64)}, "qweight int64 int8"),
        ({"qweight": ones(K, dtype=torch.int8)}, "qweight"),
        ({"qweight": torch.full((N, K), 2, dtype=torch.int8)}, "qweight 2"),
        ({"qweight": torch.full((N, K), -2, dtype=torch.int8)}, "qweight -2"),
        ({"layout": "3bit"}, "layout 3bit 2bit"),
    ],
    **{name: [*PACKED, *OTHER_IN_FEATURES] for name in READERS[:2]},
    "repack": [*PACKED, *OTHER_IN_FEATURES, ({"layout": "3bit"}, "layout 3bit 2bit")],
    "compute_weight_scale": NOT_A_WEIGHT,
    "quantize_weight": [
        *NOT_A_WEIGHT,
        ({"scale": ones(18), "quant_config": PER_CHANNEL}, "scale 18 19"),
        ({"scale": ones(N)}, "scale 19 per_tensor"),
    ],
    "dequantize_weight": [
        ({"qweight": QWEIGHT}, "qweight uint8 unpack_weights"),
        ({"qweight": ones(N, K)}, "qweight float32 int8"),
        ({"scale": ones(20), "quant_config": PER_CHANNEL}, "scale 20 19"),
    ],
    "fake_quantize_weight": NOT_A_WEIGHT,
    "compute_x_scale": NOT_AN_X,
    "quantize_x": [*NOT_AN_X, *SCALES_OF_X],
    "dequantize_x": [
        ({"qx": ones(M, K)}, "qx float32 int8"),
        ({"qx": ones(M, K, dtype=torch.int64), "quant_config": FLOAT32}, "qx int64"),
        *(({"qx": X, **change} if "quant_config" in change else change, words) for change, words in SCALES_OF_X),
    ],
    "fake_quantize_x": NOT_AN_X,
}
ROWS = [(name, *row) for name, table in TABLES.items() for row in table]


def words_of_torch_kernel(name: str, change: Arguments, words: str) -> str:
    """Its values may lie on a device: it does not name them; a width that is wrong it finds in the packed weight."""
    if "qweight" in change or (name == "forward" and "x" in change and str(K) in words):
        return ""
    return "qweight_scale" if "qweight_scale" in change else words


def test_every_function_has_a_table() -> None:
    assert TABLES.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize(("name", "change", "words"), ROWS, ids=[f"{name}: {words}" for name, _, words in ROWS])
def test_rows_of_the_tables(name: str, change: Arguments, words: str) -> None:
    call = call_of(name, **change)
    expect(QuantizationError, words, call)
    if "qweight_scale" in change:
        expect(QuantizationError, words, call_of(name, **{**change, "x": ones(0, K)}))  # Not one row to compute.
    if name.startswith("forward"):
        with KernelRegistry.forced("TorchKernel"):
            expect(QuantizationError, words_of_torch_kernel(name, change, words), call)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 5), (18, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prepare_weight_that_is_not_finite(value: float, place: tuple[int, int], dtype: torch.dtype) -> None:
    weight = WEIGHT.to(dtype, copy=True)
    weight[place] = value
    for schema in oracle.SCHEMAS[::3]:
        expect(QuantizationError, "weight", call_of("prepare_weights", weight=weight, quant_config=config_of(schema)))


# --- what holds for every function ----------------------------------------------------------------------------------

CONFIGS_OF = {name: (PER_TOKEN, FLOAT32) for name in FUNCTIONS if "_x" in name or name.startswith("forward")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_that_are_none(name: str) -> None:
    needed = [argument for argument in tensors_of(name) if argument != "bias"]
    for argument in needed:
        expect(QuantizationError, f"{argument} None", call_of(name, **{argument: None}), argument)
        if name in CONFIGS_OF:
            call = call_of(name, **{argument: None, "quant_config": FLOAT32})
            expect(QuantizationError, f"{argument} None", call, argument)
    if name not in PACKING:
        for value in (None, "int8"):
            expect(QuantizationError, f"quant_config {value} BitQuantConfig", call_of(name, quant_config=value))


BY_KERNELS = [(name, path) for name in ("forward, training", "forward", "prepare_weights") for path in PATHS]
REST = [(name, "native") for name in FUNCTIONS if name not in {name for name, _ in BY_KERNELS}]


@pytest.mark.parametrize(("name", "path"), BY_KERNELS + REST)
@pytest.mark.parametrize("kind", BAD)
def test_kinds_of_tensors(kind: str, name: str, path: str) -> None:
    """Whichever kernel is asked, with gradients and without."""
    bad, word = BAD[kind]
    with PATHS[path]():
        for argument in tensors_of(name):
            if path == "user kernel, own form" and argument == "qweight" and kind == "float64":
                continue  # The form that this kernel reads.
            words = "" if (name, argument) == ("forward", "qweight") else word
            for config in CONFIGS_OF.get(name, (PER_TOKEN,)):
                changes = {argument: bad, **({} if name in PACKING else {"quant_config": config})}
                if argument == "scale" and config is FLOAT32:
                    changes["x" if name == "quantize_x" else "qx"] = X
                expect_named(argument, words, call_of(name, **changes), f"{argument}, {config}")
                with torch.no_grad():
                    expect_named(argument, words, call_of(name, **changes), f"{argument} without gradients")


@pytest.mark.parametrize(("name", "path"), BY_KERNELS + REST)
def test_tensors_of_two_devices(name: str, path: str) -> None:
    """The second device is meta, which every machine has."""
    first, *others = tensors_of(name)
    with PATHS[path]():
        for argument in others:
            changed = FUNCTIONS[name][1][argument].to("meta")
            expect_named(argument, f"{argument} meta {first} cpu", call_of(name, **{argument: changed}), argument)
        if others:
            with pytest.raises(QuantizationError, match=rf"^({'|'.join(others)}) is on cpu, {first} is on meta$"):
                call_of(name, **{first: FUNCTIONS[name][1][first].to("meta")})()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wider_than_the_bound(device: str, path: str) -> None:
    """On a CPU a row that is one number many times over; on meta nothing is allocated at all."""
    wide = ones(1, 1).expand(1, TOO_WIDE) if device == "cpu" else torch.empty(1, TOO_WIDE, device="meta")
    codes = wide.to(torch.int8) if device == "meta" else ones(1, 1, dtype=torch.int8).expand(1, TOO_WIDE)
    scale, column = torch.ones((), device=device), torch.ones(1, 1, device=device)
    values = {"x": wide, "weight": wide, "qx": codes, "qweight": codes, "qweight_scale": scale, "bias": None}
    with PATHS[path]():
        for name in FUNCTIONS:
            if name in READERS or (path == "user kernel, own form" and name == "forward"):
                continue  # What is packed is named by its bytes; this kernel takes no codes.
            of_x = "x" in FUNCTIONS[name][1] or "qx" in FUNCTIONS[name][1]
            changes = {**values, "scale": column if of_x else scale}
            call = call_of(name, **{argument: changes[argument] for argument in tensors_of(name)})
            expect_named("(x|qx|weight|qweight)", f"{TOO_WIDE} {TOO_WIDE - 1}", call, name)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_of_zero_are_those_of_the_argument_on_every_device(device: str) -> None:
    scale, qweight, x = SCALE.to(device), QWEIGHT.to(device), torch.ones(3, 0, device=device)
    with pytest.raises(QuantizationError, match="^x has 0 features, "):
        bitlinear.forward(x, None, scale, qweight, None, PER_TOKEN)
    for shape, name in (((4, 0), "in_features"), ((0, 4), "out_features")):
        with pytest.raises(QuantizationError, match=f"^weight has 0 {name}, expected at least 1$"):
            bitlinear.prepare_weights(torch.zeros(shape, device=device), PER_TOKEN)
    column = torch.ones(3, 1, device=device)
    for name in ("compute_x_scale", "fake_quantize_x", "quantize_x"):
        with pytest.raises(QuantizationError, match=r"x has shape \(3, 0\), expected at least one column"):
            call_of(name, x=x, **({"scale": column} if name == "quantize_x" else {}))()
    with pytest.raises(QuantizationError):
        base.dequantize_x(x.to(torch.int8), column, PER_TOKEN)
    assert base.compute_x_scale(x, FLOAT32).shape == (3, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_values_of_scales_in_base_operations(value: float) -> None:
    """They check in constant time, so they do not look: codes are the formula's, 0 where it gives NaN."""
    case, scale, schema = make_linear(M, N, K), torch.tensor(value), Schema()
    config = config_of(schema)
    x, weight, _ = case.arrays
    array = np.array(value, np.float32)
    codes = oracle.quantize_weight(weight, array, schema)
    assert np.array_equal(to_codes(base.quantize_weight(case.weight, scale, config)), codes)
    qx = oracle.quantize_x(x, array, schema)
    assert np.array_equal(to_codes(base.quantize_x(case.x, scale, config)), qx)
    with np.errstate(invalid="ignore"):
        products = codes * array, qx * array
    assert_same_bits(base.dequantize_weight(torch.from_numpy(codes), scale, config), products[0], "float32")
    assert_same_bits(base.dequantize_x(torch.from_numpy(qx), scale, config), products[1], "float32")


@pytest.mark.parametrize("config", [PER_TOKEN, FLOAT32], ids=id_of)
def test_a_bound_kernel_called_without_a_tensor(config: BitQuantConfig) -> None:
    for x in (None, [[1.0]], np.ones((5, K), np.float32)):
        with pytest.raises(QuantizationError, match=r"x is (None|a list|a ndarray), expected a tensor"):
            KernelRegistry.get_kernel_for_config(config)(cast(Any, x), SCALE, QWEIGHT)


# --- compiled code --------------------------------------------------------------------------------------------------


def run_forward(x: Tensor, qweight: Tensor, training: bool) -> Tensor:
    return bitlinear.forward(x, WEIGHT, SCALE, qweight, None, PER_TOKEN, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["complex", "float64", "bool", "int64", "meta", "wide"])
def test_compiled_code(kind: str, training: bool) -> None:
    """What the fakes find, while torch traces, is a RuntimeError that names the class and the argument."""
    wide = ones(1, 1).expand(1, TOO_WIDE)
    x, word = {"meta": (X.to("meta"), "x is on meta"), "wide": (wide, str(TOO_WIDE))}.get(kind) or BAD[kind]
    run = torch.compile(run_forward, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=rf"QuantizationError[\s\S]*{re.escape(word)}"):
        run(x, QWEIGHT, training)


@pytest.mark.medium
def test_compiled_code_raises_the_same_text() -> None:
    infer = torch.compile(run_forward, fullgraph=True)
    infer(X, CODES, False)
    with pytest.raises(RuntimeError, match=r"^QuantizationError: qweight"):
        infer(X, CODES + 2, False)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["sparse COO", "nested", "quantized"])
def test_compiled_code_of_what_the_compiler_itself_refuses(kind: str) -> None:
    """Without fullgraph torch leaves such a call to eager mode, which raises as ever."""
    bad, word = BAD[kind]
    with pytest.raises(RuntimeError):
        torch.compile(run_forward, fullgraph=True, backend="aot_eager")(bad, QWEIGHT, False)
    expect_named("x", word, lambda: torch.compile(run_forward, backend="aot_eager")(bad, QWEIGHT, False))
