"""What becomes of each module of a checkpoint: the tensors that are written for it, and how they are computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitcore.config import BitQuantConfig, Granularity
from bitcore.engine import pack_weights, packed_row_bytes, prepare_weights
from bitcore.exceptions import FileError, QuantizationError
from bitmodels.checkpoints import dense
from bitmodels.checkpoints.stored import StoredTensor
from bitmodels.checkpoints.stream import Output
from bitmodels.checkpoints.ternary import (
    Codes,
    Grouping,
    ScaleChanges,
    apply_signs,
    codes_of_floats,
    encoded_codes,
    encoded_scales,
    float_bits,
    stored_grouping,
    unpacked_rows,
)

Kind = Literal["ternary", "int8", "float"]
Pieces = Iterator[tuple[str, NDArray[Any]]]
RowOrder = NDArray[np.int64] | None  # Which stored rows are the module's, in order; None: as they are.

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Part:
    """A module, or a norm or bias, of the result."""

    name: str  # Of the module; of the tensor where it is a vector.
    kind: Kind
    source: str  # The encoding that it had.
    tensors: tuple[StoredTensor, ...]  # It is made of.
    shape: tuple[int, ...]
    outputs: tuple[Output, ...]
    pieces: Callable[[], Pieces] = field(repr=False)
    quant_config: BitQuantConfig | None = None
    layout: str = ""
    changes: ScaleChanges = field(default_factory=ScaleChanges)

    @property
    def parameters(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes_before(self) -> int:
        return sum(tensor.data.size for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Wish:
    """How ternary modules are to be stored, and what their activations are."""

    layout: str
    activations: Granularity  # Of activations where weights are per group: per_group, or per_channel.

    def layout_of(self, in_features: int) -> str:
        """The layout, or 2bit where it would be no smaller."""
        try:
            packed_row_bytes(1, in_features, self.layout)
        except QuantizationError:
            return "2bit"
        return self.layout


@dataclass(frozen=True)
class _Matrix:
    """A ternary matrix as it is found."""

    name: str
    shape: tuple[int, int]
    source: str
    tensors: tuple[StoredTensor, ...]


def _part(
    matrix: _Matrix,
    config: BitQuantConfig,
    wish: Wish,
    packed: Callable[[str], tuple[NDArray[Any], NDArray[np.uint8]]],
    changes: ScaleChanges,
) -> Part:
    """A ternary part; `packed(layout)` computes its scales and packed codes."""
    rows, columns = matrix.shape
    layout = wish.layout_of(columns)
    scale_dtype = "F16" if config.weight_group_size else "F32"
    qweight = Output(f"{matrix.name}.qweight", "U8", (rows, packed_row_bytes(rows, columns, layout)))
    scale = Output(f"{matrix.name}.qweight_scale", scale_dtype, config.weight_scale_shape(rows, columns))

    def pieces() -> Pieces:
        yield from zip((scale.name, qweight.name), packed(layout), strict=True)

    outputs = (qweight, scale)
    return Part(
        matrix.name, "ternary", matrix.source, matrix.tensors, matrix.shape, outputs, pieces, config, layout, changes
    )


def _grouped(
    matrix: _Matrix, grouping: Grouping, wish: Wish, codes: Callable[[], Codes], order: RowOrder = None
) -> Part:
    """A ternary part whose scales are known, and whose codes are read when they are written."""
    activations = wish.activations if grouping.granularity == "per_group" else "per_channel"
    scale = grouping.scale if order is None or grouping.scale.ndim == 0 else grouping.scale[order]

    def packed(layout: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        found = codes()
        return scale, pack_weights(found if order is None else found[order], layout)

    return _part(matrix, grouping.config(activations), wish, packed, grouping.changes)


def of_packed_rows(
    name: str, tensor: StoredTensor, stored_scale: StoredTensor, rows: int, divides: bool, wish: Wish
) -> Part:
    """From transformers' packed rows, whose one scale multiplies or divides.

    Raises:
        FileError: a scale that is not finite, or 0 where it divides; more than one; (when written) a code 3.
    """
    (scale,) = dense.chunks(stored_scale)
    if scale.size != 1:
        raise FileError(f"{stored_scale.name} has shape {stored_scale.shape}, expected one element")
    scale = scale.reshape(1, 1)
    if divides:
        if not scale:
            raise FileError(f"{stored_scale.name} is 0, and weights are divided by it")
        scale = np.float32(1) / scale
    columns = tensor.shape[1]
    grouping = stored_grouping(name, scale, columns, columns)
    data = tensor.data.reshape(tensor.shape)
    source = f"packed rows, scale {'divides' if divides else 'multiplies'}"
    matrix = _Matrix(name, (rows, columns), source, (tensor, stored_scale))
    return _grouped(matrix, grouping, wish, lambda: apply_signs(tensor.name, unpacked_rows(data, rows), scale, columns))


def of_encoded(name: str, tensor: StoredTensor, wish: Wish, order: RowOrder) -> Part:
    """From a ternary encoding of GGUF.

    Raises:
        FileError: a scale is NaN or infinite; (when written) a code 3 whose scale is not 0.
    """
    scales, size = encoded_scales(tensor)
    grouping = stored_grouping(tensor.name, scales, size, tensor.shape[1])
    matrix = _Matrix(name, _two(tensor.shape), tensor.encoding, (tensor,))
    return _grouped(
        matrix, grouping, wish, lambda: apply_signs(tensor.name, encoded_codes(tensor), scales, size), order
    )


def of_ternary_floats(name: str, tensor: StoredTensor, grouping: Grouping, wish: Wish, order: RowOrder) -> Part:
    """From floats that are ternary already."""
    matrix = _Matrix(name, _two(tensor.shape), f"{tensor.encoding}, ternary", (tensor,))
    return _grouped(matrix, grouping, wish, lambda: codes_of_floats(tensor), order)


def of_masters(name: str, tensor: StoredTensor, wish: Wish) -> Part:
    """From float weights that are quantized in every forward, with one scale: the mean of their magnitudes.

    Raises:
        FileError: (when written) a weight is not finite.
    """
    config = BitQuantConfig("per_tensor", "int8", "per_channel")

    def packed(layout: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        bits = float_bits(tensor)[0]
        weight = bits if tensor.encoding == "bfloat16" else bits.view(tensor.encoding)
        try:
            return prepare_weights(weight, tensor.encoding, config, layout)
        except QuantizationError as error:
            raise FileError(f"{tensor.name}: {error}") from error

    matrix = _Matrix(name, _two(tensor.shape), f"{tensor.encoding} masters", (tensor,))
    return _part(matrix, config, wish, packed, ScaleChanges())


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def of_int8(name: str, tensor: StoredTensor) -> Part:
    """Any other matrix with int8 codes and a scale per row."""
    rows = tensor.shape[0]
    outputs = Output(f"{name}.weight", "I8", tensor.shape), Output(f"{name}.weight_scale", "F32", (rows,))

    def pieces() -> Pieces:
        for values in dense.chunks(tensor):
            codes, scale = dense.int8_rows(values)
            yield outputs[0].name, codes
            yield outputs[1].name, scale

    return Part(name, "int8", tensor.encoding, (tensor,), tensor.shape, outputs, pieces)


def of_floats(
    name: str, tensor: StoredTensor, order: RowOrder, factor: float | None = None, suffix: str = ".weight"
) -> Part:
    """A matrix or vector as it is; Q8_0 and Q6_K as float16.

    Args:
        factor: A number to multiply by, in float32; one rounding to the dtype that it has.
    """
    dtype = tensor.encoding if tensor.encoding in dense.FLOATS else "float16"
    output = Output(f"{name}{suffix}", _SAFETENSORS[dtype], tensor.shape)

    def narrowed() -> Iterator[NDArray[Any]]:
        for values in dense.chunks(tensor):
            yield _narrowed(tensor.name, values if factor is None else values * np.float32(factor), dtype)

    def pieces() -> Pieces:
        if order is not None:
            yield output.name, np.concatenate(list(narrowed()))[order]
            return
        for values in narrowed():
            yield output.name, values

    return Part(name, "float", tensor.encoding, (tensor,), tensor.shape, (output,), pieces)


def _narrowed(name: str, values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Rounded to nearest, ties to even; bfloat16 as uint16.

    Raises:
        FileError: float16 ends below one of them.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            narrow: NDArray[Any] = values.astype(dtype)
        if not np.isfinite(narrow).all():
            raise FileError(f"{name}: {float(np.abs(values).max()):g} lies outside of {dtype}")
        return narrow
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
