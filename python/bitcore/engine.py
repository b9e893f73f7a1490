"""The engine on NumPy arrays, without torch: packing and quantizing through the C API of bindings/c."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitcore import _c_api
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "uint8": 4}
_LAYOUTS = {"2bit": 1, "1.6bit": 2}
_GRANULARITIES = {"per_tensor": 0, "per_channel": 1, "per_group": 2}


class _Matrix(ctypes.Structure):
    """`bitlab_matrix` of bitlab.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    )


def packed_row_bytes(out_features: int, in_features: int, layout: str) -> int:
    """Bytes of a row of a packed weight.

    Raises:
        QuantizationError: there is no such shape, or it has no such layout.
    """
    row_bytes = ctypes.c_int64()
    number = _known("layout", layout, _LAYOUTS)
    _call("bitlab_packed_row_bytes", out_features, in_features, number, ctypes.byref(row_bytes))
    return row_bytes.value


def pack_weights(codes: NDArray[np.int8], layout: str) -> NDArray[np.uint8]:
    """Packs codes -1, 0 and 1 of shape (out_features, in_features).

    Raises:
        QuantizationError: another code, shape or layout.
    """
    matrix = _matrix(codes, "int8")
    packed = np.empty((len(codes), packed_row_bytes(codes.shape[0], codes.shape[1], layout)), np.uint8)
    _call("bitlab_pack_weights", matrix, _known("layout", layout, _LAYOUTS), *_memory(packed))
    return packed


def unpack_weights(packed: NDArray[np.uint8], in_features: int) -> NDArray[np.int8]:
    """The codes of a packed weight, every byte of which is checked.

    Raises:
        QuantizationError: it is damaged, or has another in_features.
    """
    matrix = _matrix(packed, "uint8")
    codes = np.empty((len(packed), in_features), np.int8)
    _call("bitlab_unpack_weights", matrix, in_features, *_memory(codes))
    return codes


def prepare_weights(
    weight: NDArray[Any], dtype: str, config: BitQuantConfig, layout: str
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Scale and packed codes of a floating weight (out_features, in_features), by the mean of its magnitudes.

    Args:
        dtype: Of the elements: "float32", "float16" or "bfloat16", which NumPy lacks: uint16 stands for it.

    Raises:
        QuantizationError: a weight that is not finite.
    """
    matrix = _matrix(weight, dtype)
    scale_dtype = np.float16 if config.weight_group_size else np.float32
    scale = np.empty(config.weight_scale_shape(weight.shape[0], weight.shape[1]), scale_dtype)
    packed = np.empty((len(weight), packed_row_bytes(weight.shape[0], weight.shape[1], layout)), np.uint8)
    granularity = _GRANULARITIES[config.weight_granularity]
    arguments = (granularity, config.group_size, _known("layout", layout, _LAYOUTS), *_memory(scale), *_memory(packed))
    _call("bitlab_prepare_weights", matrix, *arguments)
    return scale, packed


def _matrix(array: NDArray[Any], dtype: str) -> _Matrix:
    if array.ndim != 2 or array.strides[1] != array.itemsize:
        raise QuantizationError(f"a matrix has shape {array.shape} and strides {array.strides}, expected adjacent rows")
    number = _known("dtype", dtype, _DTYPES)
    stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)  # NumPy has no bfloat16.
    if array.dtype != stored:
        raise QuantizationError(f"a matrix of {dtype} has dtype {array.dtype}, expected {stored}")
    row_stride = array.strides[0] // array.itemsize
    return _Matrix(array.ctypes.data, number, *array.shape, row_stride)


def _known(name: str, value: str, choices: dict[str, int]) -> int:
    if value not in choices:
        raise QuantizationError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
    return choices[value]


def _memory(array: NDArray[Any]) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)


@cache
def _declare() -> None:
    size, memory = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_size_t)
    _c_api.declare("bitlab_packed_row_bytes", size, size, ctypes.c_int32, ctypes.c_void_p)
    _c_api.declare("bitlab_pack_weights", _Matrix, ctypes.c_int32, *memory)
    _c_api.declare("bitlab_unpack_weights", _Matrix, size, *memory)
    _c_api.declare("bitlab_prepare_weights", _Matrix, ctypes.c_int32, size, ctypes.c_int32, *memory, *memory)


def _call(name: str, *arguments: Any) -> None:
    _declare()
    _c_api.call(name, *arguments)
