"""Every snippet of the promised document, extracted from it and run as it is; its names, signatures and lists too."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch

import bitcore
import oracle
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.kernels.base import BitKernelBase
from bitcore.ops import base, bitlinear
from oracle import Schema
from support import (
    DOCUMENT,
    assert_forward,
    assert_same_bits,
    config_of,
    make_linear,
    to_array,
    to_bytes,
    to_codes,
)
from user_kernels import registered

Namespace = dict[str, Any]


@dataclass(frozen=True)
class Snippet:
    """A python block of the document: the heading above it, its place below that heading, its first line."""

    heading: str
    index: int
    line: int
    source: str

    @property
    def key(self) -> str:
        return f"{self.heading} {self.index}"

    def run(self, **names: Any) -> Namespace:
        """Executes the snippet as it is written, with `names` in reach; returns every name after it."""
        namespace: Namespace = {"__name__": "snippet", **names}
        code = compile("\n" * self.line + self.source, str(DOCUMENT), "exec")
        exec(code, namespace)
        return namespace


def document_lines() -> list[str]:
    return DOCUMENT.read_text(encoding="utf-8").splitlines()


def extract_snippets() -> Iterator[Snippet]:
    heading, index, first = "", 0, 0
    body: list[str] | None = None
    for number, line in enumerate(document_lines()):
        if body is None:
            if line.startswith("#"):
                heading, index = line.lstrip("#").strip(), 0
            elif line.strip() == "```python":
                first, body = number + 1, []
        elif line.strip() == "```":
            yield Snippet(heading, index, first, "\n".join(body) + "\n")
            index, body = index + 1, None
        else:
            body.append(line)


SNIPPETS = {snippet.key: snippet for snippet in extract_snippets()}
TRAINING = "Training Mode (`training=True`) 0"
INFERENCE = "Evaluation Mode (`training=False`) 0"
CHECKED = {
    "BitQuantConfig 0",
    "Example Usage 0",
    TRAINING,
    INFERENCE,
    "KernelRegistry 0",
    "BitKernelBase 0",
    "quantize_weight 0",
    "quantize_x 0",
    "dequantize_weight 0",
    "dequantize_x 0",
    "Error Handling 0",
}


def test_every_snippet_is_checked_below() -> None:
    assert set(SNIPPETS) == CHECKED
    assert document_lines().count("```python") == len(CHECKED)


def test_every_import_of_the_document_works() -> None:
    found = 0
    for line in document_lines():
        if match := re.match(r"from (\S+) import (.+)$", line):
            module = importlib.import_module(match[1])
            for name in match[2].split(","):
                assert hasattr(module, name.strip()), f"{match[1]} has no {name}"
                found += 1
    assert found >= 12


# --- configuration --------------------------------------------------------------------------------------------------


def test_config_snippet() -> None:
    config = SNIPPETS["BitQuantConfig 0"].run()["config"]
    assert type(config) is BitQuantConfig
    assert (config.weight_granularity, config.activation_dtype, config.activation_granularity) == (
        "per_tensor",
        "int8",
        "per_tensor",
    )
    equal = BitQuantConfig(activation_granularity="per_tensor")
    assert config == equal
    assert hash(config) == hash(equal)
    with pytest.raises(AttributeError):
        setattr(config, "activation_dtype", "float32")  # noqa: B010


def test_config_example_snippet() -> None:
    config = SNIPPETS["Example Usage 0"].run(BitQuantConfig=BitQuantConfig)["config"]
    assert type(config) is BitQuantConfig
    assert config == BitQuantConfig("per_channel", "int8", "per_channel") != BitQuantConfig()


def section(heading: str) -> str:
    """The text between a heading and the next heading of the same or a higher level."""
    lines = document_lines()
    start = next(i for i, line in enumerate(lines) if line.lstrip("#").strip() == heading and line.startswith("#"))
    level = len(lines[start]) - len(lines[start].lstrip("#"))
    end, in_code = start + 1, False
    while end < len(lines):
        in_code ^= lines[end].startswith("```")
        if not in_code and re.match(rf"#{{1,{level}}} ", lines[end]):
            break
        end += 1
    return "\n".join(lines[start + 1 : end])


def test_config_parameters_and_values_are_those_of_the_document() -> None:
    """The bullets of the Parameters list: `- **name** (`str`): ...`, and below each `  - `"value"`: ...`."""
    text = section("BitQuantConfig")
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"- \*\*(\w+)\*\*", line):
            values[match[1]] = []
        elif match := re.match(r'  - `"(\w+)"`', line):
            values[list(values)[-1]].append(match[1])
    assert list(inspect.signature(BitQuantConfig).parameters) == [*values, "group_size"]  # The document has no groups.
    assert all(len(choices) == 2 for choices in values.values())
    for name, choices in values.items():
        for choice in choices:
            assert getattr(BitQuantConfig(**cast(Any, {name: choice})), name) == choice
    granularities = {schema.weight_granularity for schema in oracle.SCHEMAS}
    assert granularities == {*values["weight_granularity"], "per_group"}
    assert {schema.activation_dtype for schema in oracle.SCHEMAS} == set(values["activation_dtype"])


# --- bitlinear.forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(4,), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize("key", [TRAINING, INFERENCE])
@pytest.mark.parametrize("bias", [True, False])
def test_snippets_of_forward(schema: Schema, dtype: str, bias: bool, key: str, leading: tuple[int, ...]) -> None:
    """Outputs alone: gradients are checked in test_gradients.py."""
    case = make_linear(leading, 19, 35, dtype, bias=bias, seed=60)
    case.weight.requires_grad_()
    names = SNIPPETS[key].run(
        input_tensor=case.x, weight_tensor=case.weight, bias_tensor=case.bias, config=config_of(schema)
    )
    output = names["output"]
    assert type(output) is torch.Tensor
    assert output.requires_grad == (key == TRAINING)
    assert_forward(output, *case.arrays, schema, dtype)
    if key == INFERENCE:
        weight = case.arrays[1]
        scale = oracle.weight_scale(weight, schema)
        assert_same_bits(names["qweight_scale"], scale, schema.scale_dtype, "qweight_scale")
        assert names["qweight"].is_contiguous()
        assert np.array_equal(to_bytes(names["qweight"]), oracle.pack(oracle.quantize_weight(weight, scale, schema)))


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults (inspect.Parameter.empty: none), in order."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


EMPTY = inspect.Parameter.empty


def test_forward_has_the_parameters_of_the_document() -> None:
    text = section("bitlinear.forward")
    documented = re.findall(r"^- \*\*(\w+)\*\* \(", text, re.MULTILINE)
    assert documented[-1] == "output"
    assert list(parameters(bitlinear.forward)) == documented[:-1]
    assert parameters(bitlinear.forward) == {
        "x": EMPTY,
        "weight": None,
        "qweight_scale": None,
        "qweight": None,
        "bias": None,
        "quant_config": None,
        "training": False,
    }


def test_prepare_weights_signature() -> None:
    found = parameters(bitlinear.prepare_weights)
    assert len(found) == 3
    assert next(iter(found)) == "weight"
    assert list(found)[2] == "layout"
    assert list(found.values())[::2] == [EMPTY, "auto"]


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", oracle.INT8_SCHEMAS, ids=str)
def test_registry_snippet(schema: Schema) -> None:
    """The snippet asks for "Int8Kernel", so its config is one of int8 activations."""
    config = config_of(schema)
    imported = SNIPPETS["KernelRegistry 0"].run(config=config)
    kernel, kernels = imported["kernel"], imported["kernels"]
    assert isinstance(kernel, BitKernelBase)
    assert kernel.name in ("Int8Kernel", *kernels)
    assert kernel.quant_config == config
    assert isinstance(kernels, list)
    assert all(type(name) is str for name in kernels)
    assert {"Int8Kernel", "Float32Kernel", "ReferenceKernel"} <= set(kernels)
    case = make_linear(3, 19, 35, seed=64)
    scale, qweight = kernel.prepare_weights(case.weight, config)
    assert_forward(kernel(case.x, scale, qweight, case.bias), *case.arrays, schema, "float32")


def test_registry_snippet_of_float32_activations_names_the_misfit() -> None:
    config = BitQuantConfig(activation_dtype="float32")
    with pytest.raises(KernelNotFoundError, match=r"Int8Kernel.*float32"):
        SNIPPETS["KernelRegistry 0"].run(config=config)


def test_registry_has_the_methods_of_the_document() -> None:
    methods = re.findall(r"^- \*\*(\w+)\*\*\((.*?)\):", section("KernelRegistry"), re.MULTILINE)
    assert [name for name, _ in methods] == ["get_kernel_for_config", "get_kernel_by_name", "list_available_kernels"]
    for name, arguments in methods:
        documented = re.findall(r"`(\w+)`", arguments)
        found = parameters(getattr(KernelRegistry, name))
        assert list(found)[: len(documented)] == documented
        assert all(default is not EMPTY for default in list(found.values())[len(documented) :])
    assert parameters(KernelRegistry.get_kernel_for_config)["device"] == "cpu"
    for name in ("register", "unregister", "forced"):
        assert callable(getattr(KernelRegistry, name))


def test_custom_kernel_snippet(schema: Schema) -> None:
    """Its methods return None: it is registered, listed and never chosen."""
    config = config_of(schema)
    custom = SNIPPETS["BitKernelBase 0"].run()["CustomKernel"]
    assert "CustomKernel" not in KernelRegistry.list_available_kernels(), "subclassing registers nothing"
    assert custom(config).quant_config == config
    assert custom().quant_config is None
    assert custom(config).is_compatible_with(config) is None
    case = make_linear(4, 19, 35, seed=66)
    names = {"input_tensor": case.x, "weight_tensor": case.weight, "bias_tensor": case.bias, "config": config}
    with registered(custom):
        assert KernelRegistry.list_available_kernels()[0] == "CustomKernel"
        with pytest.raises(KernelNotFoundError, match="CustomKernel"):
            KernelRegistry.get_kernel_by_name("CustomKernel", config)
        for key in (TRAINING, INFERENCE):
            assert_forward(SNIPPETS[key].run(**names)["output"], *case.arrays, schema, "float32")


def test_custom_kernel_that_implements_the_snippet(schema: Schema) -> None:
    """The class of the snippet, its methods filled in: found by config, used by forward."""
    config = config_of(schema)

    class FilledKernel(SNIPPETS["BitKernelBase 0"].run()["CustomKernel"]):  # type: ignore[misc]
        def prepare_weights(self, weight: torch.Tensor, quant_config: BitQuantConfig) -> Any:
            return BitKernelBase.prepare_weights(self, weight, quant_config)

        def __call__(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            reference = KernelRegistry.get_kernel_by_name("ReferenceKernel", config)
            return 2 * reference(*arguments, **keywords)

        def is_compatible_with(self, quant_config: BitQuantConfig) -> bool:
            return quant_config == config

        def accepts(self, qweight: torch.Tensor) -> bool:
            return qweight.dtype == torch.uint8

    case = make_linear(4, 19, 35, bias=False, seed=67)
    names = {"input_tensor": case.x, "weight_tensor": case.weight, "bias_tensor": None, "config": config}
    with registered(FilledKernel):
        found = KernelRegistry.get_kernel_for_config(config)
        assert (found.name, found.quant_config) == ("FilledKernel", config)
        other = next(schema_ for schema_ in oracle.SCHEMAS if schema_ != schema)
        assert KernelRegistry.get_kernel_for_config(config_of(other)).name != "FilledKernel"
        output = SNIPPETS[INFERENCE].run(**names)["output"]
    assert_forward(output / 2, *case.arrays, schema, "float32")


def test_kernel_base_has_the_signatures_of_the_document() -> None:
    custom = SNIPPETS["BitKernelBase 0"].run()["CustomKernel"]
    for name in ("prepare_weights", "__call__", "is_compatible_with"):
        documented, found = parameters(getattr(custom, name)), parameters(getattr(BitKernelBase, name))
        assert list(found)[: len(documented)] == list(documented)
        assert {key: found[key] for key in documented} == documented
        assert all(default is not EMPTY for default in list(found.values())[len(documented) :])
    assert parameters(BitKernelBase) == {"quant_config": None}


# --- base operations ------------------------------------------------------------------------------------------------


def run_base(name: str, first: torch.Tensor, scale: torch.Tensor, config: BitQuantConfig) -> torch.Tensor:
    """What the snippet of a base operation assigns, of its first argument and its scale."""
    argument, result = BASE[name]
    found = SNIPPETS[f"{name} 0"].run(**{argument: first, "scale": scale, "quant_config": config})[result]
    assert type(found) is torch.Tensor
    return found


BASE = {
    "quantize_weight": ("weight", "qweight"),
    "quantize_x": ("x", "qx"),
    "dequantize_weight": ("qweight", "dqweight"),
    "dequantize_x": ("qx", "dqx"),
}


def test_snippets_of_a_weight(schema: Schema, dtype: str) -> None:
    case, config = make_linear(1, 19, 35, dtype, seed=68), config_of(schema)
    weight = case.arrays[1]
    expected_scale = oracle.weight_scale(weight, schema)
    codes = oracle.quantize_weight(weight, expected_scale, schema)
    assert set(np.unique(codes)) == {-1, 0, 1}
    scale = base.compute_weight_scale(case.weight, config)
    assert_same_bits(scale, expected_scale, schema.scale_dtype, "weight scale")
    qweight = run_base("quantize_weight", case.weight.requires_grad_(), scale, config)
    assert np.array_equal(to_codes(qweight), codes)
    assert not qweight.requires_grad
    dqweight = run_base("dequantize_weight", qweight, scale, config)
    assert_same_bits(dqweight, oracle.dequantize_weight(codes, expected_scale, schema), "float32")


def test_snippets_of_x(schema: Schema, dtype: str) -> None:
    case, config = make_linear((3, 4), 19, 35, dtype, seed=69), config_of(schema)
    x = case.arrays[0]
    scale = base.compute_x_scale(case.x, config)
    assert_same_bits(scale, oracle.x_scale(x, schema), "float32", "x scale")
    qx = run_base("quantize_x", case.x.requires_grad_(schema.is_int8), scale, config)
    if schema.is_int8:
        codes = oracle.quantize_x(x, to_array(scale), schema)
        assert np.abs(codes.astype(int)).max() == 127
        assert np.array_equal(to_codes(qx), codes)
        assert not qx.requires_grad
        x = oracle.dequantize_x(codes, to_array(scale), schema)
    else:
        assert qx is case.x
    assert_same_bits(run_base("dequantize_x", qx, scale, config), x, "float32")


def test_quantize_x_reaches_every_code() -> None:
    """A scale smaller than that of x clamps at -128 and 127."""
    x = torch.arange(-200, 201, dtype=torch.float32)
    qx = run_base("quantize_x", x, torch.tensor([1.0]), BitQuantConfig(activation_granularity="per_tensor"))
    assert np.array_equal(to_codes(qx), np.clip(np.arange(-200, 201), -128, 127))


def test_quantize_rounds_half_to_even() -> None:
    config = BitQuantConfig(activation_granularity="per_tensor")
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5])
    assert run_base("quantize_x", values, torch.tensor(1.0), config).tolist() == [0, 2, 2, 0, -2, -2, 126, 127]
    weight = torch.tensor([[0.5, -0.5, 0.50001, -0.50001, 1.5, -1.5]])
    assert run_base("quantize_weight", weight, torch.tensor(1.0), config).tolist() == [[0, 0, 1, -1, 1, -1]]


@pytest.mark.parametrize("name", BASE)
def test_base_operations_take_the_arguments_of_the_document(name: str) -> None:
    found = parameters(getattr(base, name))
    assert list(found) == [BASE[name][0], "scale", "quant_config"]
    call = re.search(rf"{name}\((.*)\)", SNIPPETS[f"{name} 0"].source)
    assert call is not None
    assert call[1].split(", ") == list(found)


# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (None, ""),
        (QuantizationError("x is odd"), "Quantization failed: x is odd\n"),
        (KernelNotFoundError("no kernel"), "No suitable kernel found: no kernel\n"),
        (BitLabError("else"), "BitLab error: else\n"),
    ],
)
def test_exceptions_snippet(
    error: Exception | None, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet as it is, then with its `pass` replaced by a raise: each error takes its own branch."""
    snippet = SNIPPETS["Error Handling 0"]
    names = snippet.run()
    assert issubclass(names["QuantizationError"], names["BitLabError"])
    assert issubclass(names["KernelNotFoundError"], names["BitLabError"])
    assert snippet.source.count("    pass\n") == 1
    raising = snippet.source.replace("    pass\n", "    if error is not None:\n        raise error\n")
    Snippet(snippet.heading, 0, snippet.line, raising).run(error=error)
    assert capsys.readouterr().out == printed


def test_exceptions_are_also_pythons_own() -> None:
    assert issubclass(QuantizationError, ValueError)
    assert issubclass(KernelNotFoundError, LookupError)
    assert issubclass(BitLabError, Exception)
    assert not issubclass(BitLabError, (ValueError, LookupError))


def test_top_level_exports_what_the_document_imports() -> None:
    for match in re.finditer(r"^from bitcore\.\S+ import (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE):
        for name in match[1].split(", "):
            assert hasattr(bitcore, name), f"bitcore does not export {name}"
