"""Embeddings of deployed models: rows of ternary or int8 codes, times their scales."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitcore._torch_private import is_tracing
from bitcore.config import BitQuantConfig, require_config
from bitcore.exceptions import QuantizationError
from bitcore.operators import checks
from bitcore.operators.torch_packing import TILE_ROWS, Fault, raise_faults, trailer_faults
from bitcore.ops.bitlinear import prepare_weights
from bitcore.ops.packing import check_qweight, pack_weights
from bitlayers.bitlinear import (
    _MAX_OUT_FEATURES,
    MAX_IN_FEATURES,
    _check_shape,
    _named,
    _require_dtype,
    _require_size,
    require_no_hooks,
)
from bitlayers.packed_module import (
    INT8_PARTS,
    PackedModule,
    check_int8,
    check_scale,
    empty_int8,
    quantize_int8_rows,
)

_DIGITS = {"2bit": (4, 4), "1.6bit": (3, 5)}
"""Of each layout: the base of a byte's digits, and how many there are. docs/packed-format.md describes them."""


class PackedEmbedding(PackedModule):
    """What the embeddings have in common: sizes, the dtype of the rows, and the look at the ids.

    It is no `nn.Embedding`: there is no float weight.
    """

    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
    ) -> None:
        _require_size("num_embeddings", num_embeddings, _MAX_OUT_FEATURES)
        _require_size("embedding_dim", embedding_dim, MAX_IN_FEATURES)
        _require_dtype(dtype)
        super().__init__()
        self.num_embeddings, self.embedding_dim = int(num_embeddings), int(embedding_dim)
        self.padding_idx = _checked_padding(padding_idx, self.num_embeddings)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows; `to(dtype)` changes it."""
        return self.like.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Looks up rows.

        Args:
            input: (*), ids of rows, int64 or int32.

        Returns:
            (*, embedding_dim), of the module's dtype: code times scale, a float32 product, rounded once.

        Raises:
            QuantizationError: input is no tensor of ids; what is looked up is damaged (on a CPU; on other devices, and
                in compiled code, the rows are NaN).
            IndexError: an id that does not exist (on a CPU; on others as for `nn.Embedding`).
        """
        checks.given(input=input)
        checks.same_device("input", input, **{part: getattr(self, part) for part in self.parts})
        if input.dtype not in (torch.int64, torch.int32):
            raise QuantizationError(f"input has dtype {input.dtype}, expected {torch.int64} or {torch.int32}")
        rows = self._rows(input.reshape(-1).long())
        return rows.to(self.dtype).reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._weight_repr()}, dtype={self.dtype}"

    def _filled(self, codes: Tensor, scale: Tensor, embedding: nn.Embedding) -> Self:
        """This module, made on the meta device, with the rows and the mode of an `nn.Embedding`."""
        self._hold(codes, scale)
        self.like = torch.empty(0, dtype=self.dtype, device=codes.device)
        return self.train(embedding.training)

    def _weight_repr(self) -> str:
        raise NotImplementedError

    def _rows(self, ids: Tensor) -> Tensor:
        """float32 (n, embedding_dim) of int64 ids (n,)."""
        raise NotImplementedError


class TernaryEmbedding(PackedEmbedding):
    """An embedding whose rows are -1, 0 and +1 times a scale, packed exactly as the weight of a deployed `BitLinear`.

    Only the rows that are asked for are unpacked. It is deployed by nature: there is no trainable state. Until a state
    is loaded all rows are zero.

    Args:
        num_embeddings: How many rows there are.
        embedding_dim: The size of a row.
        quant_config: How scales are given; `BitQuantConfig()` if None. Its activations do not matter here.
        layout: How codes are packed: "2bit" or "1.6bit".
        padding_idx: Kept as an attribute, as `nn.Embedding` does.
        dtype: Of the rows: float32, bfloat16 or float16.
        device: Where the tensors live.

    Attributes:
        qweight: uint8 (num_embeddings, R + T), packed.
        qweight_scale: float32, () or (num_embeddings,), or float16 (num_embeddings, groups); also through `half()` and
            `to(dtype)`.

    Raises:
        QuantizationError: a size that is no integer, below 1 or too large, a dtype that is none of the three, no
            BitQuantConfig, a layout that does not exist for embedding_dim, a padding_idx that is no row.
    """

    parts = ("qweight", "qweight_scale")
    qweight: Tensor
    qweight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        quant_config: BitQuantConfig | None = None,
        *,
        layout: str = "2bit",
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, device)
        self.quant_config = require_config(BitQuantConfig() if quant_config is None else quant_config)
        layout = checks.chosen_layout(layout, self.embedding_dim)
        self._hold(*_empty_ternary((self.num_embeddings, self.embedding_dim), self.quant_config, layout, device))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, quant_config: BitQuantConfig | None = None, *, layout: str = "2bit"
    ) -> Self:
        """The rows of an `nn.Embedding`, quantized and packed as `bitlinear.prepare_weights` does it.

        Raises:
            QuantizationError: the weight is not finite; the embedding has a max_norm or hooks; as the constructor.
        """
        _require_plain(embedding)
        sizes = embedding.num_embeddings, embedding.embedding_dim
        dtype, padding_idx = embedding.weight.dtype, embedding.padding_idx
        made = cls(*sizes, quant_config, layout=layout, padding_idx=padding_idx, dtype=dtype, device="meta")
        with torch.inference_mode(False), torch.no_grad():
            qweight_scale, qweight = prepare_weights(embedding.weight, made.quant_config, layout)
        return made._filled(qweight, qweight_scale, embedding)

    @property
    def layout(self) -> str:
        """How the codes are packed: "2bit" or "1.6bit"."""
        return checks.layout_of(self.qweight, self.embedding_dim) or "2bit"

    def _weight_repr(self) -> str:
        weight: str = self.quant_config.weight_granularity
        if weight == "per_group":
            weight += f" of {self.quant_config.group_size}"
        return f"weight=ternary {weight}, layout={self.layout}"

    def _rows(self, ids: Tensor) -> Tensor:
        codes, invalid = _unpacked(_row_words(self.qweight, ids, self.embedding_dim), self.layout, self.embedding_dim)
        scale = _row_scales(self.qweight_scale, ids, self.quant_config, self.embedding_dim)
        damaged = ~(torch.isfinite(scale) & (scale > 0)).all()
        faults = [
            *trailer_faults(self.qweight, self.embedding_dim),
            Fault(invalid, "qweight holds an invalid code"),
            Fault(damaged, "qweight_scale holds a scale that is not finite and positive"),
        ]
        return _without(faults, (codes.float() - 1) * scale)

    def _check(self, prefix: str, codes: Tensor, scale: Tensor) -> None:
        _check_shape(prefix + "qweight", codes, tuple(self.qweight.shape))
        if codes.dtype != torch.uint8:
            raise QuantizationError(f"{prefix}qweight has dtype {codes.dtype}, expected {torch.uint8}")
        if not codes.is_meta:
            _named(prefix + "qweight", check_qweight, codes, self.embedding_dim)
        shape = self.quant_config.weight_scale_shape(self.num_embeddings, self.embedding_dim)
        dtype = checks.weight_scale_dtype(self.quant_config.weight_group_size)
        check_scale(prefix + "qweight_scale", scale, shape, dtype)


class Int8Embedding(PackedEmbedding):
    """An embedding whose rows are int8 codes, times one float32 scale each.

    It is deployed by nature: there is no trainable state. Until a state is loaded all rows are zero.

    Args:
        num_embeddings: How many rows there are.
        embedding_dim: The size of a row.
        padding_idx: Kept as an attribute, as `nn.Embedding` does.
        dtype: Of the rows: float32, bfloat16 or float16.
        device: Where the tensors live.

    Attributes:
        weight: int8 (num_embeddings, embedding_dim), -127 to 127.
        weight_scale: float32 (num_embeddings,), also through `half()` and `to(dtype)`.

    Raises:
        QuantizationError: a size that is no integer, below 1 or too large, a dtype that is none of the three, a
            padding_idx that is no row.
    """

    parts = INT8_PARTS
    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, device)
        self._hold(*empty_int8(self.num_embeddings, self.embedding_dim, device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """The rows of an `nn.Embedding` in int8 (see `quantize_int8_rows`).

        Raises:
            QuantizationError: the weight is not finite; the embedding has a max_norm or hooks.
        """
        _require_plain(embedding)
        sizes = embedding.num_embeddings, embedding.embedding_dim
        made = cls(*sizes, padding_idx=embedding.padding_idx, dtype=embedding.weight.dtype, device="meta")
        return made._filled(*quantize_int8_rows(embedding.weight), embedding)

    def _weight_repr(self) -> str:
        return "weight=int8 per row"

    def _rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight).float() * self.weight_scale[ids, None]

    def _check(self, prefix: str, codes: Tensor, scale: Tensor) -> None:
        check_int8(prefix, codes, scale, (self.num_embeddings, self.embedding_dim))


def _checked_padding(padding_idx: int | None, num_embeddings: int) -> int | None:
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise QuantizationError(f"padding_idx is {padding_idx!r}, expected an integer or None")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise QuantizationError(f"padding_idx is {padding_idx}, expected a row of {num_embeddings}")
    return padding_idx % num_embeddings


def _require_plain(embedding: nn.Embedding) -> None:
    """Refuses an embedding that does more than its weight says."""
    if embedding.max_norm is not None:
        raise QuantizationError(f"the embedding has max_norm {embedding.max_norm}, expected None")
    require_no_hooks(embedding)


def _empty_ternary(
    shape: tuple[int, int], config: BitQuantConfig, layout: str, device: torch.device | str | int | None
) -> tuple[Tensor, Tensor]:
    """Packed zeros, and scales of 1."""
    dtype = checks.weight_scale_dtype(config.weight_group_size)
    with torch.inference_mode(False):  # Autograd may have to save them.
        scale = torch.ones(config.weight_scale_shape(*shape), dtype=dtype, device=device)
        if scale.is_meta:
            row_bytes = sum(checks.packed_row_bytes(*shape, layout))
            return torch.empty(shape[0], row_bytes, dtype=torch.uint8, device=device), scale
        return pack_weights(torch.zeros(shape, dtype=torch.int8, device=device), layout), scale


def _row_words(qweight: Tensor, ids: Tensor, in_features: int) -> Tensor:
    """The payload of single rows: uint8 (n, steps, 4). An id that does not exist is an index that does not exist."""
    rows = qweight.shape[0]
    layout = checks.layout_of(qweight, in_features)
    if layout is None:
        raise QuantizationError(
            f"qweight has shape {tuple(qweight.shape)}, which fits no layout of {in_features} codes"
        )
    steps = checks.payload_row_bytes(in_features, layout) // checks.WORD_BYTES
    words = qweight.reshape(-1)[: rows * steps * checks.WORD_BYTES].view(-1, checks.WORD_BYTES)
    first = ids // TILE_ROWS * TILE_ROWS  # The first row of a tile, which holds its words step by step.
    height = (rows - first).clamp(max=TILE_ROWS)
    places = (first * steps + ids - first)[:, None] + torch.arange(steps, device=ids.device) * height[:, None]
    exists = (ids >= 0) & (ids < rows)
    return functional.embedding(torch.where(exists[:, None], places, words.shape[0]), words)


def _unpacked(words: Tensor, layout: str, in_features: int) -> tuple[Tensor, Tensor]:
    """Codes 0, 1 and 2, uint8 (n, in_features), and whether something is no code."""
    base, digits = _DIGITS[layout]
    values = torch.tensor([base**digit for digit in range(digits)], dtype=torch.uint8, device=words.device)
    fields = words[:, :, None].div(values[:, None], rounding_mode="floor")
    invalid = (fields % base == 3) if base == 4 else (words >= base**digits)
    return (fields % base).flatten(1)[:, :in_features], invalid.any()


def _row_scales(qweight_scale: Tensor, ids: Tensor, config: BitQuantConfig, in_features: int) -> Tensor:
    """float32: (), (n, 1) or (n, in_features)."""
    if config.weight_granularity == "per_tensor":
        return qweight_scale.float()
    scale = qweight_scale[ids].float()
    if config.weight_granularity == "per_channel":
        return scale[:, None]
    return scale.repeat_interleave(config.group_size, 1)[:, :in_features]


def _without(faults: list[Fault], rows: Tensor) -> Tensor:
    """The rows, if there is no fault. Otherwise an error, or NaN where a look at values would wait for a device."""
    if rows.is_cpu and not torch.compiler.is_compiling() and not is_tracing():
        raise_faults(faults)
        return rows
    found = torch.stack([fault.found for fault in faults]).any()
    return rows.masked_fill(found, torch.nan)
