"""TernaryEmbedding, Int8Embedding and Int8Linear: rows and products of codes and scales, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear
from bitcore.ops.base import dequantize_weight
from bitcore.ops.packing import pack_weights
from bitcore.testing import assert_same_bits
from bitlayers import BitLinear, Int8Embedding, Int8Linear, TernaryEmbedding, packed_module, quantize_int8_rows, summary

PER_ROW = BitQuantConfig("per_channel")
GROUPS = BitQuantConfig("per_group", group_size=32)
CONFIGS = {"per_tensor": BitQuantConfig(), "per_channel": PER_ROW, "per_group": GROUPS}
SHAPES = [(1, 1), (5, 18), (16, 64), (33, 70), (47, 130)]  # Rows and codes; the last tile and the last step are short.
LAYOUTS = ("2bit", "1.6bit")

layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ternary(shape: tuple[int, int], config: BitQuantConfig, layout: str, **options: Any) -> tuple[Any, Tensor]:
    """A loaded embedding, and its rows as floats."""
    codes = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale = (noise(*config.weight_scale_shape(*shape)).abs() + 0.1).to(
        torch.float16 if config == GROUPS else torch.float32
    )
    layer = TernaryEmbedding(*shape, config, layout=layout, **options)
    layer.load_state_dict({"qweight": pack_weights(codes, layout), "qweight_scale": scale})
    return layer, dequantize_weight(codes, scale, config)


def int8_state(shape: tuple[int, int]) -> dict[str, Tensor]:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return {"weight": codes, "weight_scale": noise(shape[0]).abs() + 0.01}


def int8_rows(state: dict[str, Tensor]) -> Tensor:
    return state["weight"].float() * state["weight_scale"][:, None]


def loaded(layer: Any, state: dict[str, Tensor]) -> Any:
    layer.load_state_dict(state, strict=False)
    return layer


def all_kinds() -> dict[str, tuple[Any, Tensor]]:
    """Every layer, and what it is called with."""
    ids, x = torch.tensor([[3, 0], [16, 19]]), noise(2, 3, 70)
    return {
        "2bit": (ternary((20, 70), GROUPS, "2bit")[0], ids),
        "1.6bit": (ternary((20, 70), PER_ROW, "1.6bit")[0], ids),
        "int8": (loaded(Int8Embedding(20, 70), int8_state((20, 70))), ids),
        "linear": (loaded(Int8Linear(70, 20, bias=True), int8_state((20, 70))), x),
    }


KINDS = list(all_kinds())
each_kind = pytest.mark.parametrize("kind", KINDS)


# --- embeddings -------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_ternary_embeddings(shape: tuple[int, int], config: BitQuantConfig, layout: str) -> None:
    if layout == "1.6bit" and shape in SHAPES[:1] + SHAPES[2:3]:
        with pytest.raises(QuantizationError, match='layout "1.6bit" does not exist for'):
            TernaryEmbedding(*shape, config, layout=layout)
        return
    layer, rows = ternary(shape, config, layout)
    assert layer.layout == layout
    assert_same_bits(layer(torch.arange(shape[0])), rows)
    for ids in (torch.tensor(0), torch.empty(2, 0, dtype=torch.int64), torch.zeros(2, 3, 1, dtype=torch.int32)):
        assert_same_bits(layer(ids), rows[ids.long()])


@dtypes
@layouts
def test_rows_are_rounded_once(layout: str, dtype: torch.dtype) -> None:
    layer, rows = ternary((20, 70), GROUPS, layout, dtype=dtype)
    state = int8_state((20, 70))
    for embedding, expected in ((layer, rows), (loaded(Int8Embedding(20, 70, dtype=dtype), state), int8_rows(state))):
        assert_same_bits(embedding(torch.arange(20)), expected.to(dtype))
        assert embedding.dtype == dtype
        embedding.to(torch.bfloat16)
        assert_same_bits(embedding(torch.arange(20)), expected.bfloat16())


@layouts
def test_the_bytes_are_those_of_a_deployed_layer(layout: str) -> None:
    embedding = nn.Embedding(20, 70, padding_idx=-1)
    scale, qweight = bitlinear.prepare_weights(embedding.weight, GROUPS, layout)
    layer = TernaryEmbedding.from_embedding(embedding, GROUPS, layout=layout)
    assert torch.equal(layer.qweight, qweight)
    assert torch.equal(layer.qweight_scale, scale)
    assert layer.padding_idx == 19


def test_an_int8_embedding_of_floats() -> None:
    embedding = nn.Embedding(20, 70, dtype=torch.bfloat16).eval()
    layer = Int8Embedding.from_embedding(embedding)
    codes, scale = quantize_int8_rows(embedding.weight)
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer.weight_scale, scale)
    assert (layer.dtype, layer.training) == (torch.bfloat16, False)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("index", [-1, 20, 2**31, -(2**40)])
def test_ids_that_do_not_exist(kind: str, index: int) -> None:
    layer, _ = all_kinds()[kind]
    for embedding in (layer, nn.Embedding(20, 70)):
        with pytest.raises(IndexError):
            embedding(torch.tensor([[3, index]]))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_is_no_id(kind: str) -> None:
    layer, _ = all_kinds()[kind]
    with pytest.raises(QuantizationError, match="input has dtype torch.float32, expected torch.int64 or torch.int32"):
        layer(torch.ones(2))
    with pytest.raises(QuantizationError, match="input is a list, expected a tensor"):
        layer([1])


@layouts
def test_damage_after_loading_is_found(layout: str) -> None:
    damaged: list[tuple[Callable[[Any], Any], str]] = [
        (lambda layer: layer.qweight[0].fill_(255), "qweight holds an invalid code"),
        (lambda layer: layer.qweight_scale.fill_(-1), "qweight_scale holds a scale that is not finite and positive"),
        (lambda layer: layer.qweight.view(-1)[-80:].fill_(0), "qweight has no trailer of a packed weight"),
    ]
    for damage, message in damaged:
        layer, _ = ternary((20, 70), PER_ROW, layout)
        damage(layer)
        with pytest.raises(QuantizationError, match=message):
            layer(torch.arange(20))
        compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
        assert compiled(torch.arange(20)).isnan().all()


# --- the int8 linear layer --------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)], ids=str)
def test_products(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "CHUNK_ELEMENTS", 7 * 70)  # 20 rows: the last chunk is short.
    state = int8_state((20, 70)) | ({"bias": noise(20, seed=5)} if bias else {})
    layer = Int8Linear(70, 20, bias=bias, dtype=dtype)
    layer.load_state_dict(state)
    x = noise(*shape, 70, seed=2).to(dtype)
    y = layer(x)
    expected = x.double() @ int8_rows(state).double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "CHUNK_ELEMENTS", 7 * 70)
    state = int8_state((20, 70))
    layer = loaded(Int8Linear(70, 20, bias=True), state)
    x, dy = noise(2, 3, 70).requires_grad_(), noise(2, 3, 20, seed=4)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ int8_rows(state), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    half = x.detach().bfloat16().requires_grad_()
    layer(half).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_autocast() -> None:
    state = int8_state((20, 70))
    layer = loaded(Int8Linear(70, 20), state)
    x = noise(3, 70).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_same_bits(y, layer(x).bfloat16())  # Nothing but the result is rounded.
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_an_int8_layer_of_floats() -> None:
    linear = nn.Linear(70, 20).eval()
    layer = Int8Linear.from_linear(linear)
    assert layer.bias is linear.bias
    assert not layer.training
    torch.testing.assert_close(layer(noise(3, 70)), linear(noise(3, 70)), rtol=0, atol=0.02)


def test_what_a_linear_layer_refuses() -> None:
    layer = Int8Linear(70, 20)
    for x, message in (
        (noise(3, 69), "x has 69 features, weight expects 70"),
        (noise(3, 70).double(), "x has dtype float64"),
        (torch.empty(3, 70, device="meta"), "weight is on cpu, input is on meta"),
    ):
        with pytest.raises(QuantizationError, match=message):
            layer(x)


@dtypes
def test_codes_and_scales_of_rows(dtype: torch.dtype) -> None:
    weight = noise(9, 33).to(dtype)
    weight[4] = 0
    codes, scale = quantize_int8_rows(weight)
    for row, row_codes, row_scale in zip(weight.float(), codes, scale, strict=True):
        most = float(row.abs().max())
        assert float(row_scale) == (float(torch.tensor(most) / torch.tensor(127.0)) if most else 1.0)
        assert row_codes.tolist() == [max(-127, min(127, round(float(each)))) for each in row / row_scale]
    assert quantize_int8_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))[0].tolist() == [[127, 0, 2, -2]]
    assert quantize_int8_rows(torch.tensor([[1e-45, 0.0]]))[1].tolist() == [1.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_has_no_int8_codes(value: float) -> None:
    with pytest.raises(QuantizationError, match="weight holds NaN or infinity"):
        quantize_int8_rows(torch.tensor([[1.0, value], [1.0, 2.0]]))
    with pytest.raises(QuantizationError, match="weight has 1 dimensions, expected 2"):
        quantize_int8_rows(torch.ones(3))
    with pytest.raises(QuantizationError, match="weight has dtype int8"):
        quantize_int8_rows(torch.ones(3, 4, dtype=torch.int8))


# --- states -----------------------------------------------------------------------------------------------------------


@each_kind
def test_casts_and_modes_change_no_code(kind: str) -> None:
    layer, given = all_kinds()[kind]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    for change in (layer.half, layer.bfloat16, layer.float, layer.train, layer.eval):
        change()
        for name, tensor in before.items():
            assert_equal(layer.state_dict()[name], tensor)
    assert layer(given).dtype == torch.float32


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@each_kind
def test_copies(kind: str) -> None:
    layer, given = all_kinds()[kind]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(copied(given), layer(given))
    state = layer.state_dict()
    assert set(state) - {"bias"} == set(layer.parts)
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(state, assign=True)
    assert empty.state_dict().keys() == state.keys()
    assert all(torch.equal(empty.state_dict()[name], tensor) for name, tensor in state.items())


@each_kind
def test_what_is_made_in_inference_mode_takes_gradients(kind: str) -> None:
    with torch.inference_mode():
        layer, given = all_kinds()[kind]
    if kind == "linear":
        layer(given.clone().requires_grad_()).sum().backward()
    assert not any(tensor.is_inference() for name, tensor in layer.state_dict().items() if name != "bias")


@each_kind
def test_compiled_layers_are_one_graph(kind: str) -> None:
    layer, given = all_kinds()[kind]
    compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
    assert_same_bits(compiled(given), layer(given))


@each_kind
def test_layers_on_the_meta_device(kind: str) -> None:
    layer, given = all_kinds()[kind]
    y = layer(given)
    moved = layer.to("meta")
    assert moved(given.to("meta")).shape == y.shape
    for part in layer.parts:
        assert getattr(moved, part).is_meta


def damaged_states() -> list[tuple[str, dict[str, Any], str]]:
    codes, scale = pack_weights(torch.zeros(20, 70, dtype=torch.int8), "2bit"), torch.ones(20, 3, dtype=torch.float16)
    flipped = codes.clone()
    flipped[0, 0] ^= 1
    int8, rows = torch.zeros(20, 70, dtype=torch.int8), torch.ones(20)
    other = pack_weights(torch.zeros(20, 70, dtype=torch.int8), "1.6bit")
    return [
        ("2bit", {"qweight": codes}, r"state_dict holds \['0.qweight'\], expected qweight and qweight_scale"),
        ("2bit", {"qweight": flipped, "qweight_scale": scale}, "0.qweight: qweight is damaged"),
        ("2bit", {"qweight": codes.int(), "qweight_scale": scale}, "0.qweight has dtype torch.int32"),
        ("2bit", {"qweight": other, "qweight_scale": scale}, "0.qweight has shape .20, 20., expected .20, 24."),
        ("2bit", {"qweight": codes, "qweight_scale": scale.float()}, "0.qweight_scale has dtype torch.float32, expe"),
        ("2bit", {"qweight": codes, "qweight_scale": scale[:, :2]}, "0.qweight_scale has shape .20, 2., expected"),
        ("2bit", {"qweight": codes, "qweight_scale": scale * torch.nan}, "0.qweight_scale holds a scale that is not"),
        ("int8", {"weight_scale": rows}, "state_dict holds ..0.weight_scale.., expected weight and weight_scale"),
        ("int8", {"weight": int8 - 128, "weight_scale": rows}, "0.weight holds the code -128, expected -127 to 127"),
        ("int8", {"weight": int8.float(), "weight_scale": rows}, "0.weight has dtype torch.float32, expected torch.i"),
        ("int8", {"weight": int8[1:], "weight_scale": rows}, "0.weight has shape .19, 70., expected .20, 70."),
        ("linear", {"weight": int8, "weight_scale": rows[1:]}, "0.weight_scale has shape .19,., expected .20,."),
        ("linear", {"weight": int8, "weight_scale": rows.half()}, "0.weight_scale has dtype torch.float16, expected"),
        ("linear", {"weight": int8, "weight_scale": rows * 0}, "0.weight_scale holds a scale that is not finite"),
        ("linear", {"weight": int8, "weight_scale": rows, "bias": rows * torch.inf}, "0.bias holds NaN or infinity"),
        ("linear", {"weight": int8, "weight_scale": rows, "bias": rows[1:]}, "0.bias has shape .19,., expected .20,."),
    ]


@pytest.mark.parametrize(("kind", "state", "message"), damaged_states())
def test_a_damaged_state_changes_nothing(kind: str, state: dict[str, Any], message: str) -> None:
    layer, _ = all_kinds()[kind]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(QuantizationError, match=message):
        nn.Sequential(layer).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_the_empty_tensor_beside_packed_weights_is_passed_over() -> None:
    layer, _ = ternary((20, 70), GROUPS, "2bit")
    layer.load_state_dict({**layer.state_dict(), "weight": torch.empty(0, dtype=torch.uint8)})


@each_kind
def test_what_is_shared_stays_shared(kind: str) -> None:
    layer, _ = all_kinds()[kind]
    other = copy.deepcopy(layer)
    for part in layer.parts:
        setattr(other, part, getattr(layer, part))
    nn.Sequential(layer, other)._apply(lambda tensor: tensor.clone())
    assert all(getattr(other, part) is getattr(layer, part) for part in layer.parts)


# --- what they are called ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TernaryEmbedding(0, 4), "num_embeddings is 0, expected an integer from 1 to"),
        (lambda: TernaryEmbedding(4, 2**24), "embedding_dim is 16777216, expected an integer from 1 to 16777215"),
        (lambda: TernaryEmbedding(4, 4, "int8"), "quant_config is 'int8', expected a BitQuantConfig"),  # type: ignore[arg-type]
        (lambda: TernaryEmbedding(4, 4, layout="3bit"), 'layout is "3bit", expected'),
        (lambda: Int8Embedding(4, 4, padding_idx=4), "padding_idx is 4, expected a row of 4"),
        (lambda: Int8Embedding(4, 4, padding_idx=True), "padding_idx is True, expected an integer or None"),
        (lambda: Int8Embedding(4, 4, dtype=torch.float64), "dtype is torch.float64, expected one of"),
        (lambda: Int8Linear(4, 0), "out_features is 0, expected an integer from 1 to"),
        (lambda: Int8Linear(4, 4, bias=None), "bias is None, expected True or False"),  # type: ignore[arg-type]
        (lambda: Int8Embedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0)), "max_norm 1.0, expected None"),
    ],
)
def test_arguments_that_do_not_exist(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        make()


def test_what_they_are_called() -> None:
    layers = {name: repr(layer) for name, (layer, _) in all_kinds().items()}
    assert layers == {
        "2bit": "TernaryEmbedding(20, 70, weight=ternary per_group of 32, layout=2bit, dtype=torch.float32)",
        "1.6bit": "TernaryEmbedding(20, 70, weight=ternary per_channel, layout=1.6bit, dtype=torch.float32)",
        "int8": "Int8Embedding(20, 70, weight=int8 per row, dtype=torch.float32)",
        "linear": "Int8Linear(in_features=70, out_features=20, bias=True, weight=int8 per row)",
    }


def test_summaries() -> None:
    listed = summary(nn.Sequential(*(layer for layer, _ in all_kinds().values()), BitLinear(70, 20))).layers
    assert [layer.kind for layer in listed] == ["ternary", "ternary", "int8", "int8", "ternary"]
    assert [layer.state for layer in listed] == ["deployed"] * 4 + ["trainable"]
    assert {(layer.out_features, layer.in_features) for layer in listed} == {(20, 70)}
    assert [layer.bytes for layer in listed[:4]] == [20 * 24 + 2 * 60, 20 * 20 + 4 * 20, 1400 + 4 * 20, 1400 + 4 * 40]
