"""Tensors of torch that quantization does not take, and what the error about one has to say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.exceptions import QuantizationError
from core_helpers import make_layer


def bad_tensors() -> dict[str, tuple[Tensor, str]]:
    """(4, 37), but for the nested ones, each with the word that its error must hold."""
    x = make_layer(4).x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that some of these are prototypes or go away
        return {
            "sparse COO": (x.to_sparse(), "torch.sparse_coo"),
            "sparse CSR": (x.to_sparse_csr(), "torch.sparse_csr"),
            "mkldnn": (x.to_mkldnn(), "torch._mkldnn"),
            "nested": (torch.nested.nested_tensor([x, x]), "nested"),
            "jagged": (torch.nested.nested_tensor([x, x], layout=torch.jagged), "nested"),
            "quantized": (torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "quint8"),
            "complex": (torch.complex(x, x), "complex64"),
            "half complex": (torch.complex(x, x).to(torch.complex32), "complex32"),
            "float64": (x.double(), "float64"),
            "bool": (x > 0, "bool"),
            "int64": (x.long(), "int64"),
        }


BAD = bad_tensors()


def expect(error: type[Exception], words: str, call: Callable[[], Any], what: str = "") -> None:
    """`call` raises `error` in one line that holds every word of `words` as a whole word."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"{what}: {type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    assert "\n" not in message, f"{what}: {message}"
    assert not message.startswith(error.__name__), f"{what}: {message}"
    for word in words.split():
        assert re.search(rf"(?<![\w.-]){re.escape(word)}(?!\w)", message), f"{what}: {word!r} is missing: {message}"


def expect_named(name: str, words: str, call: Callable[[], Any], what: str = "") -> None:
    """A QuantizationError whose message begins with the argument's name."""
    with pytest.raises(QuantizationError, match=f"^{name} "):
        call()
    expect(QuantizationError, words, call, what)
