"""Bad input gets the documented exception, whose message names the argument and both values."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

import oracle
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.kernels.base import BitKernelBase
from bitcore.ops import base, bitlinear
from oracle import Bytes, Schema
from support import FLOAT32_KERNELS, assert_same_bits, config_of, covers, make_linear, to_bytes, to_codes

M, N, K = 4, 19, 37
PAYLOAD = N * oracle.packed_columns(N, K)[0]
"""Where the trailer of the packed (N, K) weight begins."""


def expect(error: type[Exception], words: list[str], call: Callable[[], Any]) -> None:
    """`call` raises `error` and its message holds every word, each as a whole word."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    assert "\n" not in message, message
    assert not message.startswith(error.__name__), message
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(word)}(?!\w)", message), f"{word!r} is missing: {message}"


def training(**changes: Any) -> Callable[[], Any]:
    """A training call that would work but for `changes`."""
    case = make_linear(M, N, K, seed=80)
    arguments: dict[str, Any] = {"x": case.x, "weight": case.weight, "bias": case.bias}
    arguments |= {"quant_config": BitQuantConfig(), **changes}
    return lambda: bitlinear.forward(training=True, **arguments)


def inference(**changes: Any) -> Callable[[], Any]:
    """An inference call that would work but for `changes`."""
    case = make_linear(M, N, K, seed=80)
    config = changes.get("quant_config") or BitQuantConfig()
    scale, qweight = bitlinear.prepare_weights(case.weight, config)
    arguments: dict[str, Any] = {"x": case.x, "qweight_scale": scale, "qweight": qweight, "bias": case.bias}
    arguments |= {"quant_config": config, **changes}
    return lambda: bitlinear.forward(**arguments)


PER_CHANNEL = BitQuantConfig("per_channel", "int8", "per_channel")


def test_calls_work_unless_changed() -> None:
    training()(), inference()(), inference(quant_config=PER_CHANNEL)()


# --- forward --------------------------------------------------------------------------------------------------------

X_CASES: list[tuple[str, object, list[str]]] = [
    ("None", None, ["x", "None"]),
    ("array", np.ones((M, K), np.float32), ["x", "ndarray"]),
    ("scalar", torch.tensor(1.0), ["x"]),
    ("too narrow", torch.randn(M, 36), ["x", "36", "37"]),
    ("too wide", torch.randn(2, M, 53), ["x", "53", "37"]),
    ("one-dimensional of wrong width", torch.randn(41), ["x", "41", "37"]),
    ("empty of wrong width", torch.randn(0, 41), ["x", "41", "37"]),
    ("int64", torch.ones(M, K, dtype=torch.int64), ["x", "int64", "float32"]),
    ("int8", torch.ones(M, K, dtype=torch.int8), ["x", "int8", "float32"]),
    ("bool", torch.ones(M, K, dtype=torch.bool), ["x", "bool", "float32"]),
    ("float64", torch.ones(M, K, dtype=torch.float64), ["x", "float64", "float32"]),
]
BIAS_CASES: list[tuple[str, torch.Tensor, list[str]]] = [
    ("too short", torch.randn(18), ["bias", "18", "19"]),
    ("one element", torch.randn(1), ["bias", "1", "19"]),
    ("scalar", torch.tensor(1.0), ["bias", "19"]),
    ("two dimensions", torch.randn(1, 19), ["bias", "19"]),
    ("int32", torch.ones(19, dtype=torch.int32), ["bias", "int32", "float32"]),
    ("float64", torch.ones(19, dtype=torch.float64), ["bias", "float64", "float32"]),
]
calls = pytest.mark.parametrize("call", [training, inference], ids=["training", "inference"])
kernels = pytest.mark.parametrize("kernel", [(), ("TorchKernel",)], ids=["native", "TorchKernel"])


@kernels
@calls
@pytest.mark.parametrize(("x", "words"), [case[1:] for case in X_CASES], ids=[case[0] for case in X_CASES])
def test_x(call: Callable[..., Callable[[], Any]], x: object, words: list[str], kernel: tuple[str, ...]) -> None:
    """TorchKernel sees a wrong width as a weight that was packed for another one, or not at all for this x."""
    other_words = bool(kernel) and call is inference and str(K) in words
    with KernelRegistry.forced(*kernel):
        expect(QuantizationError, [] if other_words else words, call(x=x))


@kernels
@calls
@pytest.mark.parametrize(("bias", "words"), [case[1:] for case in BIAS_CASES], ids=[case[0] for case in BIAS_CASES])
def test_bias(
    call: Callable[..., Callable[[], Any]], bias: torch.Tensor, words: list[str], kernel: tuple[str, ...]
) -> None:
    with KernelRegistry.forced(*kernel):
        expect(QuantizationError, words, call(bias=bias))


def test_a_config_that_is_none_or_a_name() -> None:
    for value in (None, "int8"):
        expect(QuantizationError, ["quant_config", str(value), "BitQuantConfig"], training(quant_config=value))
    expect(QuantizationError, ["quant_config", "None", "BitQuantConfig"], inference(quant_config=None))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        pytest.param(None, ["weight", "None"], id="None"),
        pytest.param(torch.randn(N), ["weight", "1"], id="one dimension"),
        pytest.param(torch.randn(1, N, K), ["weight", "3"], id="three dimensions"),
        pytest.param(torch.randn(N, 38), ["x", "37", "38"], id="other width"),
        pytest.param(torch.ones(N, K, dtype=torch.int8), ["weight", "int8", "float32"], id="int8"),
        pytest.param(torch.ones(N, K, dtype=torch.float64), ["weight", "float64", "float32"], id="float64"),
        pytest.param(torch.ones(0, K), ["weight", "0", "1"], id="no rows"),
    ],
)
def test_weight_in_training(weight: torch.Tensor | None, words: list[str]) -> None:
    expect(QuantizationError, words, training(weight=weight, bias=None))


def test_width_that_is_too_large() -> None:
    wide = torch.ones(1, 1).expand(1, 2**24)
    for call in (
        lambda: bitlinear.prepare_weights(wide, BitQuantConfig()),
        lambda: bitlinear.pack_weights(torch.ones(1, 1, dtype=torch.int8).expand(1, 2**24)),
        lambda: bitlinear.forward(wide, weight=wide, quant_config=BitQuantConfig(), training=True),
    ):
        expect(QuantizationError, ["16777216", "16777215"], call)


@pytest.mark.parametrize("name", ["qweight", "qweight_scale"])
def test_missing_argument_of_inference(name: str) -> None:
    expect(QuantizationError, [name, "None"], inference(**{name: None}))


def test_training_call_without_the_flag_names_what_is_missing() -> None:
    case = make_linear(M, N, K)
    expect(
        QuantizationError,
        ["None", "training=False"],
        lambda: bitlinear.forward(case.x, weight=case.weight, quant_config=BitQuantConfig()),
    )


SCALE_CASES: list[tuple[str, BitQuantConfig, torch.Tensor, list[str]]] = [
    ("zero", BitQuantConfig(), torch.tensor(0.0), ["qweight_scale", "0"]),
    ("negative", BitQuantConfig(), torch.tensor(-0.5), ["qweight_scale", "-0.5"]),
    ("NaN", BitQuantConfig(), torch.tensor(torch.nan), ["qweight_scale", "nan"]),
    ("infinite", BitQuantConfig(), torch.tensor(torch.inf), ["qweight_scale", "inf"]),
    ("one of each row", BitQuantConfig(), torch.ones(N), ["qweight_scale", "19", "per_tensor"]),
    ("empty", BitQuantConfig(), torch.ones(0), ["qweight_scale", "0"]),
    ("int64", BitQuantConfig(), torch.tensor(1), ["qweight_scale", "int64", "float32"]),
    ("float64", BitQuantConfig(), torch.tensor(1.0, dtype=torch.float64), ["qweight_scale", "float64", "float32"]),
    ("bfloat16", BitQuantConfig(), torch.tensor(1.0).bfloat16(), ["qweight_scale", "bfloat16", "float32"]),
    ("one for all rows", PER_CHANNEL, torch.tensor(1.0), ["qweight_scale", "19"]),
    ("too few", PER_CHANNEL, torch.ones(18), ["qweight_scale", "18", "19"]),
    ("row", PER_CHANNEL, torch.ones(1, N), ["qweight_scale", "19"]),
    ("one zero", PER_CHANNEL, torch.ones(N).index_fill(0, torch.tensor(17), 0), ["qweight_scale", "0"]),
    ("one negative", PER_CHANNEL, torch.ones(N).index_fill(0, torch.tensor(17), -0.25), ["qweight_scale", "-0.25"]),
    ("one NaN", PER_CHANNEL, torch.ones(N).index_fill(0, torch.tensor(18), torch.nan), ["qweight_scale", "nan"]),
    ("one infinite", PER_CHANNEL, torch.ones(N).index_fill(0, torch.tensor(0), torch.inf), ["qweight_scale", "inf"]),
]


@pytest.mark.parametrize(("config", "scale", "words"), [c[1:] for c in SCALE_CASES], ids=[c[0] for c in SCALE_CASES])
def test_weight_scale(config: BitQuantConfig, scale: torch.Tensor, words: list[str]) -> None:
    """For the best kernel, for TorchKernel, and where there is not one row to compute."""
    expect(QuantizationError, words, inference(quant_config=config, qweight_scale=scale))
    expect(QuantizationError, words, inference(quant_config=config, qweight_scale=scale, x=torch.ones(0, K)))
    with KernelRegistry.forced("TorchKernel"):
        expect(QuantizationError, ["qweight_scale"], inference(quant_config=config, qweight_scale=scale))


def packed(n: int, k: int) -> torch.Tensor:
    codes = np.random.default_rng([81, n, k]).integers(-1, 2, (n, k)).astype(np.int8)
    return torch.from_numpy(oracle.pack(codes))


QWEIGHT_CASES: list[tuple[str, torch.Tensor, list[str]]] = [
    ("one dimension", packed(N, K).flatten(), ["qweight"]),
    ("three dimensions", packed(N, K)[None], ["qweight"]),
    ("one column short", packed(N, K)[:, :-1], ["qweight", "15"]),
    ("one column more", torch.cat([packed(N, K), packed(N, K)[:, :1]], dim=1), ["qweight", "17"]),
    ("one row short", packed(N, K)[:-1], ["qweight"]),
    ("one row more", torch.cat([packed(N, K), packed(N, K)[:1]]), ["qweight"]),
    ("empty", packed(N, K)[:0], ["qweight"]),
    ("of another width of as many bytes", packed(N, 40), ["x", "37", "40"]),
    ("of another width", packed(N, 100), ["x", "37", "100"]),
    ("int32", packed(N, K).int(), ["qweight", "int32", "uint8"]),
    ("float32", packed(N, K).float(), ["qweight", "float32", "uint8"]),
    ("plain codes of another width", torch.ones(N, 38, dtype=torch.int8), ["x", "37", "38"]),
    ("plain code 2", torch.full((N, K), 2, dtype=torch.int8), ["qweight", "2"]),
    ("plain code -128", torch.full((N, K), -128, dtype=torch.int8), ["qweight", "-128"]),
]


@pytest.mark.parametrize(("qweight", "words"), [c[1:] for c in QWEIGHT_CASES], ids=[c[0] for c in QWEIGHT_CASES])
def test_qweight(qweight: torch.Tensor, words: list[str]) -> None:
    """Values are named by the native kernels; TorchKernel, whose values may lie on a device, refuses the same."""
    call = inference(qweight=qweight, bias=None)
    expect(QuantizationError, words, call)
    with KernelRegistry.forced("TorchKernel"):
        expect(QuantizationError, [], call)


def test_tensors_of_two_devices() -> None:
    expect(QuantizationError, ["meta", "cpu"], inference(x=torch.empty(M, K, device="meta")))
    expect(QuantizationError, ["meta", "cpu"], training(weight=torch.empty(N, K, device="meta")))


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("weight_granularity", "per_row", "per_channel"),
        ("weight_granularity", "PER_TENSOR", "per_tensor"),
        ("activation_dtype", "int4", "int8"),
        ("activation_dtype", "bfloat16", "float32"),
        ("activation_granularity", "per_token", "per_channel"),
        ("activation_granularity", "", "per_tensor"),
    ],
)
def test_config_values(name: str, value: str, allowed: str) -> None:
    expect(
        QuantizationError,
        [name, allowed, *([value] if value else [])],
        lambda: BitQuantConfig(**cast(Any, {name: value})),
    )


def test_config_value_of_another_type() -> None:
    for value in (None, 8, torch.int8, ["int8"]):
        expect(QuantizationError, ["activation_dtype"], partial(BitQuantConfig, activation_dtype=cast(Any, value)))


def test_config_keyword() -> None:
    with pytest.raises(TypeError, match="weight_dtype"):
        BitQuantConfig(weight_dtype="int2")  # type: ignore[call-arg]


# --- preparing and packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 5), (18, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prepare_weight_that_is_not_finite(value: float, place: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_linear(M, N, K).weight.to(dtype)
    weight[place] = value
    for schema in oracle.SCHEMAS[::3]:
        config = config_of(schema)
        expect(QuantizationError, ["weight"], partial(bitlinear.prepare_weights, weight, config))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        pytest.param(None, ["weight"], id="None"),
        pytest.param(torch.randn(K), ["weight", "1"], id="one dimension"),
        pytest.param(torch.randn(2, N, K), ["weight", "3"], id="three dimensions"),
        pytest.param(torch.ones(N, K, dtype=torch.int8), ["weight", "int8"], id="int8"),
        pytest.param(torch.ones(N, K, dtype=torch.uint8), ["weight", "uint8"], id="uint8"),
        pytest.param(torch.ones(N, K, dtype=torch.float64), ["weight", "float64"], id="float64"),
        pytest.param(torch.randn(0, K), ["weight", "0", "1"], id="no rows"),
        pytest.param(torch.randn(N, 0), ["weight", "0", "1"], id="no columns"),
    ],
)
def test_prepare_weights(weight: torch.Tensor | None, words: list[str]) -> None:
    expect(QuantizationError, words, lambda: bitlinear.prepare_weights(cast(Any, weight), BitQuantConfig()))


def test_layout_that_does_not_exist() -> None:
    weight, codes = torch.randn(N, K), torch.ones(N, K, dtype=torch.int8)
    for call in (
        lambda: bitlinear.prepare_weights(weight, BitQuantConfig(), layout="3bit"),
        lambda: bitlinear.pack_weights(codes, layout="3bit"),
        lambda: bitlinear.repack(packed(N, K), K, "3bit"),
    ):
        expect(QuantizationError, ["layout", "3bit", "2bit"], call)


def test_config_of_prepare_weights_that_is_none() -> None:
    expect(QuantizationError, ["None"], lambda: bitlinear.prepare_weights(torch.randn(N, K), cast(Any, None)))


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        pytest.param(torch.ones(N, K), ["qweight", "float32", "int8"], id="float32"),
        pytest.param(torch.ones(N, K, dtype=torch.int64), ["qweight", "int64", "int8"], id="int64"),
        pytest.param(torch.ones(K, dtype=torch.int8), ["qweight"], id="one dimension"),
        pytest.param(torch.full((N, K), 2, dtype=torch.int8), ["qweight", "2"], id="code 2"),
        pytest.param(torch.full((N, K), -2, dtype=torch.int8), ["qweight", "-2"], id="code -2"),
    ],
)
def test_pack_weights(codes: torch.Tensor, words: list[str]) -> None:
    expect(QuantizationError, words, lambda: bitlinear.pack_weights(codes))


READERS: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "check_qweight": lambda qweight, k: bitlinear.check_qweight(qweight, k),
    "unpack_weights": lambda qweight, k: bitlinear.unpack_weights(qweight, k),
    "repack": lambda qweight, k: bitlinear.repack(qweight, k, "2bit"),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Callable[[torch.Tensor, int], Any]:
    """The functions that read every byte of a packed weight."""
    return READERS[request.param]


PACKED_CASES = [case for case in QWEIGHT_CASES if not case[0].startswith("plain")]


@pytest.mark.parametrize(("qweight", "words"), [c[1:] for c in PACKED_CASES], ids=[c[0] for c in PACKED_CASES])
def test_readers(reader: Callable[[torch.Tensor, int], Any], qweight: torch.Tensor, words: list[str]) -> None:
    words = [word for word in words if word != "x"]
    expect(QuantizationError, words, lambda: reader(qweight, K))


@pytest.mark.parametrize("in_features", [-1, 0, 36, 38, 48, 2**24, 2**62])
def test_readers_of_other_in_features(reader: Callable[[torch.Tensor, int], Any], in_features: int) -> None:
    expect(QuantizationError, ["in_features", str(in_features)], lambda: reader(packed(N, K), in_features))


# --- damaged bytes --------------------------------------------------------------------------------------------------

TRAILER_FIELDS = {"magic": (0, 8), "version": (8, 12), "layout": (12, 16), "out_features": (16, 24)}
TRAILER_FIELDS |= {"in_features": (24, 32)}


def damaged(offset: int, flip: int) -> torch.Tensor:
    qweight = packed(N, K)
    qweight.view(-1)[offset] ^= flip
    return qweight


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("field", TRAILER_FIELDS)
def test_each_byte_of_each_trailer_field(field: str, flip: int) -> None:
    """Seen by every reader, and by forward on a CPU, whatever the kernel."""
    first, last = TRAILER_FIELDS[field]
    for offset in range(first, last):
        qweight = damaged(PAYLOAD + offset, flip)
        for read in READERS.values():
            expect(QuantizationError, ["qweight"], partial(read, qweight, K))
        expect(QuantizationError, ["qweight"], inference(qweight=qweight))
    with KernelRegistry.forced("TorchKernel"):
        expect(QuantizationError, ["qweight"], inference(qweight=damaged(PAYLOAD + first, flip)))


@pytest.mark.parametrize("field", TRAILER_FIELDS)
def test_trailer_errors_name_the_values(field: str) -> None:
    first, last = TRAILER_FIELDS[field]
    value, words = {
        "magic": (int.from_bytes(b"BITLABQX", "little"), []),
        "version": (2, ["2", "1"]),
        "layout": (9, ["9"]),
        "out_features": (20, ["20", "19"]),
        "in_features": (38, ["38", "37"]),
    }[field]
    stored = value.to_bytes(last - first, "little")
    qweight = packed(N, K)
    qweight.view(-1)[PAYLOAD + first : PAYLOAD + last] = torch.tensor(list(stored), dtype=torch.uint8)
    expect(QuantizationError, ["qweight", *words], lambda: bitlinear.check_qweight(qweight, K))


@pytest.mark.parametrize("offset", [*range(32, 40), *range(40, 64), N * oracle.packed_columns(N, K)[1] - 1])
def test_checksum_and_zeros_of_the_trailer(reader: Callable[[torch.Tensor, int], Any], offset: int) -> None:
    expect(QuantizationError, ["qweight"], lambda: reader(damaged(PAYLOAD + offset, 0x10), K))


def forward_fields(qweight: Bytes, x: torch.Tensor, scale: torch.Tensor, schema: Schema) -> oracle.Floats:
    codes = oracle.unpack(qweight, K)
    return oracle.forward_codes(x.numpy(), codes, scale.numpy(), None, schema, "float32")


@pytest.mark.medium
def test_flips_in_the_payload(kernel: str) -> None:
    """Readers refuse every flip; forward raises where a field becomes 3, else computes what the bytes say."""
    rng = np.random.default_rng(82)
    schema = Schema("per_channel", "int8" if covers(kernel, Schema()) else "float32", "per_channel")
    x, scale = torch.from_numpy(rng.standard_normal((M, K)).astype(np.float32)), torch.ones(N)
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        qweight = damaged(int(rng.integers(PAYLOAD)), 1 << int(rng.integers(8)))
        for read in READERS.values():
            expect(QuantizationError, ["qweight"], partial(read, qweight, K))
        invalid = bool((oracle.unpack_fields(to_bytes(qweight), K) == 3).any())
        call = inference(x=x, qweight=qweight, qweight_scale=scale, bias=None, quant_config=config_of(schema))
        outcomes[invalid] += 1
        with KernelRegistry.forced(kernel):
            if invalid:
                expect(QuantizationError, ["qweight"], call)
            elif schema.is_int8:
                assert_same_bits(call(), forward_fields(to_bytes(qweight), x, scale, schema), "float32")
            else:
                codes = torch.from_numpy(oracle.unpack(to_bytes(qweight), K)).float()
                assert torch.allclose(call(), x @ codes.t(), rtol=1e-4, atol=1e-5)
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 16, 64), (1, 33, 500), (13, 33, 500), (40, 17, 1030)])
def test_invalid_code_anywhere(kernel: str, m: int, n: int, k: int) -> None:
    """One code 3 at the ends, in the padding and in between is seen by one row of x and by many."""
    schema = Schema("per_tensor", "int8" if covers(kernel, Schema()) else "float32", "per_channel")
    case = make_linear(m, n, k, seed=83)
    scale, qweight = bitlinear.prepare_weights(case.weight, config_of(schema))
    payload = n * oracle.packed_columns(n, k)[0]
    for offset in sorted({0, payload // 3, payload // 2, payload - 1}):
        for field in range(4):
            broken = qweight.clone()
            broken.view(-1)[offset] |= 3 << (2 * field)
            with KernelRegistry.forced(kernel):
                expect(
                    QuantizationError,
                    ["qweight"],
                    partial(
                        bitlinear.forward,
                        case.x,
                        qweight_scale=scale,
                        qweight=broken,
                        quant_config=config_of(schema),
                    ),
                )
    with KernelRegistry.forced(kernel):
        bitlinear.forward(case.x, qweight_scale=scale, qweight=qweight, quant_config=config_of(schema))


# --- base operations ------------------------------------------------------------------------------------------------

CODES = torch.ones(N, K, dtype=torch.int8)
BASE_CASES: list[tuple[str, Callable[[], Any], list[str]]] = [
    (
        "quantize_weight: scale of other rows",
        lambda: base.quantize_weight(torch.randn(N, K), torch.ones(18), PER_CHANNEL),
        ["scale", "18", "19"],
    ),
    (
        "quantize_weight: a scale per row for per_tensor",
        lambda: base.quantize_weight(torch.randn(N, K), torch.ones(N), BitQuantConfig()),
        ["scale", "19", "per_tensor"],
    ),
    (
        "quantize_weight: int8 weight",
        lambda: base.quantize_weight(CODES, torch.tensor(1.0), BitQuantConfig()),
        ["weight", "int8", "float32"],
    ),
    (
        "quantize_weight: one dimension",
        lambda: base.quantize_weight(torch.randn(K), torch.tensor(1.0), BitQuantConfig()),
        ["weight", "1"],
    ),
    (
        "quantize_weight: config is None",
        lambda: base.quantize_weight(torch.randn(N, K), torch.tensor(1.0), cast(Any, None)),
        ["quant_config", "None"],
    ),
    (
        "quantize_weight: scale is None",
        lambda: base.quantize_weight(torch.randn(N, K), cast(Any, None), BitQuantConfig()),
        ["scale", "None"],
    ),
    (
        "quantize_x: integer x",
        lambda: base.quantize_x(torch.ones(M, K, dtype=torch.int32), torch.tensor(1.0), BitQuantConfig()),
        ["x", "int32", "float32"],
    ),
    (
        "quantize_x: scale of other rows",
        lambda: base.quantize_x(torch.randn(M, K), torch.ones(5, 1), PER_CHANNEL),
        ["scale", "5", "4"],
    ),
    (
        "quantize_x: scale per input feature",
        lambda: base.quantize_x(torch.randn(M, K), torch.ones(K), PER_CHANNEL),
        ["scale", "37", "4"],
    ),
    (
        "dequantize_weight: packed bytes",
        lambda: base.dequantize_weight(packed(N, K), torch.tensor(1.0), BitQuantConfig()),
        ["qweight", "uint8", "unpack_weights"],
    ),
    (
        "dequantize_weight: float codes",
        lambda: base.dequantize_weight(torch.ones(N, K), torch.tensor(1.0), BitQuantConfig()),
        ["qweight", "float32", "int8"],
    ),
    (
        "dequantize_weight: scale of other rows",
        lambda: base.dequantize_weight(CODES, torch.ones(20), PER_CHANNEL),
        ["scale", "20", "19"],
    ),
    (
        "dequantize_x: float codes",
        lambda: base.dequantize_x(torch.ones(M, K), torch.tensor(1.0), BitQuantConfig()),
        ["qx", "float32", "int8"],
    ),
    (
        "dequantize_x: scale of other rows",
        lambda: base.dequantize_x(torch.ones(M, K, dtype=torch.int8), torch.ones(3, 1), PER_CHANNEL),
        ["scale", "3", "4"],
    ),
    (
        "compute_weight_scale: int8 weight",
        lambda: base.compute_weight_scale(CODES, BitQuantConfig()),
        ["weight", "int8", "float32"],
    ),
    (
        "compute_x_scale: integer x",
        lambda: base.compute_x_scale(torch.ones(M, K, dtype=torch.int16), BitQuantConfig()),
        ["x", "int16", "float32"],
    ),
]


@pytest.mark.parametrize(("call", "words"), [c[1:] for c in BASE_CASES], ids=[c[0] for c in BASE_CASES])
def test_base_operations(call: Callable[[], Any], words: list[str]) -> None:
    expect(QuantizationError, words, call)


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


@pytest.mark.parametrize("name", ["quantize_weight", "quantize_x", "dequantize_weight", "dequantize_x"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_argument_of_base_operations_that_is_none(name: str, place: int) -> None:
    first = {"quantize_weight": torch.ones(N, K), "quantize_x": torch.ones(M, K), "dequantize_weight": CODES}
    arguments = [first.get(name, CODES), torch.tensor(1.0), BitQuantConfig()]
    arguments[place] = cast(Any, None)
    function = getattr(base, name)
    expect(
        QuantizationError, [list(inspect.signature(function).parameters)[place], "None"], partial(function, *arguments)
    )


@pytest.mark.parametrize("name", ["pack_weights", "unpack_weights", "check_qweight", "repack"])
def test_qweight_of_packing_that_is_none(name: str) -> None:
    rest = {"pack_weights": [], "repack": [K, "2bit"]}.get(name, [K])
    expect(QuantizationError, ["qweight", "None"], partial(getattr(bitlinear, name), None, *rest))


# --- kernels --------------------------------------------------------------------------------------------------------


def test_kernel_names() -> None:
    config = BitQuantConfig()
    expect(KernelNotFoundError, ["Int9Kernel"], lambda: KernelRegistry.get_kernel_by_name("Int9Kernel", config))
    for name in FLOAT32_KERNELS:
        if not covers(name, Schema()):
            expect(KernelNotFoundError, [name, "int8"], partial(KernelRegistry.get_kernel_by_name, name, config))


def test_kernel_that_this_machine_lacks() -> None:
    lacking = [entry for entry in json.loads(torch.ops.bitcore.list_kernels())["kernels"] if not entry["supported"]]
    if not lacking:
        pytest.skip("this machine runs every kernel")
    for entry in lacking:
        schema = Schema(activation_dtype="int8" if covers(entry["name"], Schema()) else "float32")
        expect(
            KernelNotFoundError,
            [entry["name"], *entry["requirement"].split()],
            partial(KernelRegistry.get_kernel_by_name, entry["name"], config_of(schema)),
        )


def test_registered_name_that_is_taken_or_unknown() -> None:
    class ReferenceKernel(BitKernelBase):
        pass

    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.register(ReferenceKernel)
    expect(KernelNotFoundError, ["Int9Kernel"], lambda: KernelRegistry.unregister("Int9Kernel"))
    with pytest.raises(BitLabError, match="ReferenceKernel"):
        KernelRegistry.unregister("ReferenceKernel")
    assert "ReferenceKernel" in KernelRegistry.list_available_kernels()


def test_kernel_without_a_config() -> None:
    class LooseKernel(BitKernelBase):
        def __call__(
            self,
            x: torch.Tensor,
            qweight_scale: torch.Tensor,
            qweight: torch.Tensor,
            bias: torch.Tensor | None = None,
            quant_config: BitQuantConfig | None = None,
        ) -> torch.Tensor:
            assert quant_config == PER_CHANNEL
            return x

    x = torch.ones(M, K)
    expect(QuantizationError, ["quant_config", "None"], lambda: LooseKernel()(x, x, x))
    assert LooseKernel(PER_CHANNEL)(x, x, x) is x
    assert LooseKernel()(x, x, x, quant_config=PER_CHANNEL) is x
