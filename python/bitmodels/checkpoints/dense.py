"""Matrices that are not ternary: their rows as float32, and as int8 with a scale per row."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitcore.exceptions import FileError
from bitmodels.checkpoints.stored import StoredTensor
from bitmodels.checkpoints.ternary import float_bits, widened

FLOATS = ("float32", "float16", "bfloat16")
QUANTIZED = ("Q8_0", "Q6_K")
READ_ENCODINGS = (*FLOATS, *QUANTIZED)

_CHUNK = 1 << 22  # Elements that are float32 at a time.


def chunks(tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
    """The rows of a matrix (or the elements of a vector) as float32, some at a time.

    Raises:
        FileError: one is NaN or infinite.
    """
    rows = tensor.shape[0]
    step = max(1, _CHUNK * rows // max(1, tensor.numel))
    for first in range(0, rows, step):
        values = _rows(tensor, first, min(rows, first + step))
        if others := int((~np.isfinite(values)).sum()):
            raise FileError(f"{tensor.name}: {others:,} elements are NaN or infinite")
        yield values


def _rows(tensor: StoredTensor, first: int, last: int) -> NDArray[np.float32]:
    if tensor.encoding in FLOATS:
        return widened(float_bits(tensor)[0][first:last], tensor.encoding)
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.encoding]
    values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data.reshape(tensor.shape[0], -1)[first:last], kind)
    return values


def int8_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and a scale per row: s = absmax / 127 (1 for a row of zeros), clamp(round(w / s), -127, 127)."""
    scale = np.abs(values).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    quotients: NDArray[Any] = values / scale[:, None]
    np.rint(quotients, out=quotients)
    np.clip(quotients, -127, 127, out=quotients)
    return quotients.astype(np.int8), scale
