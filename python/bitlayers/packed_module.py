"""What embeddings and heads that hold codes and scales have in common: two buffers, which keep their dtypes and are
checked, byte by byte, when they are loaded."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bitcore.exceptions import QuantizationError
from bitcore.operators import checks
from bitlayers.bitlinear import _check_one_device, _check_shape, _is_placeholder, _ordinary, _with_dtype_of

INT8_PARTS = ("weight", "weight_scale")
MOST_INT8 = 127
"""The largest magnitude of an int8 code: -128 is none."""

CHUNK_ELEMENTS = 2**18
"""How many int8 codes are widened to float32 at once on a CPU: 1 MiB, which stays in a core's L2 cache."""

DEVICE_CHUNK_ELEMENTS = 2**24
"""And on other devices, where a launch costs more than the memory."""


class PackedModule(nn.Module):
    """A module whose weight is a buffer of codes and one of scales.

    It is deployed by nature: there is no float weight to train, and `train()` and `eval()` only set the flag.

    Attributes:
        parts: The names of the two buffers, codes first.
    """

    parts: ClassVar[tuple[str, str]]

    def check_weight(self, prefix: str = "", codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Looks at every byte of the weight, or of what is given in its place.

        Args:
            prefix: Stands before the names in errors.
            codes, scale: What is about to be loaded; what the module holds if None.

        Raises:
            QuantizationError: something is damaged, or has another shape or dtype than the module; names it.
        """
        held_codes, held_scale = (getattr(self, part) for part in self.parts)
        self._check(prefix, held_codes if codes is None else codes, held_scale if scale is None else scale)

    def _check(self, prefix: str, codes: Tensor, scale: Tensor) -> None:
        raise NotImplementedError

    def _hold(self, codes: Tensor, scale: Tensor) -> None:
        for part, tensor in zip(self.parts, (codes, scale), strict=True):
            self.register_buffer(part, _ordinary(tensor))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts like every module, but leaves the dtypes of codes and scales alone."""
        before: dict[str, Tensor] = {part: getattr(self, part) for part in self.parts}
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            setattr(self, part, _moved(tensor, _with_dtype_of(tensor, self._buffers[part])))
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Takes the state that is loaded after a look at every byte of it."""
        if "weight" not in self.parts and _is_placeholder(state_dict.get(prefix + "weight")):
            state_dict = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        found = {prefix + part: state_dict[prefix + part] for part in self.parts if prefix + part in state_dict}
        if len(found) == 1:
            raise QuantizationError(f"state_dict holds {list(found)}, expected {' and '.join(self.parts)}")
        if found:
            _check_one_device(found)
            self.check_weight(prefix, *found.values())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        for part in self.parts:
            setattr(self, part, _ordinary(getattr(self, part)))


def _moved(tensor: Tensor, moved: Tensor) -> Tensor:
    """`tensor`, now with the memory of `moved`: a layer that is tied to it, and moved after it, stays tied."""
    plain = type(tensor) is Tensor and type(moved) is Tensor and not (tensor.is_inference() or moved.is_inference())
    if moved is tensor or tensor.is_meta or moved.is_meta or not plain:
        return moved
    tensor.data = moved
    return tensor


def check_scale(name: str, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape, dtype and values of scales, which are finite and positive.

    Raises:
        QuantizationError
    """
    _check_shape(name, scale, shape)
    if scale.dtype != dtype:
        raise QuantizationError(f"{name} has dtype {scale.dtype}, expected {dtype}")
    if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise QuantizationError(f"{name} holds a scale that is not finite and positive")


def check_int8(prefix: str, weight: Tensor, weight_scale: Tensor, shape: tuple[int, int]) -> None:
    """int8 codes of `shape`, and their float32 scales, one per row.

    Raises:
        QuantizationError
    """
    name = prefix + "weight"
    _check_shape(name, weight, shape)
    if weight.dtype != torch.int8:
        raise QuantizationError(f"{name} has dtype {weight.dtype}, expected {torch.int8}")
    if not weight.is_meta and int(weight.min()) < -MOST_INT8:
        raise QuantizationError(f"{name} holds the code -128, expected -127 to 127")
    check_scale(prefix + "weight_scale", weight_scale, shape[:1], torch.float32)


def empty_int8(rows: int, columns: int, device: torch.device | str | int | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix of zeros."""
    with torch.inference_mode(False):  # Autograd may have to save them.
        weight = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        return weight, torch.ones(rows, dtype=torch.float32, device=device)


def row_chunks(matrix: Tensor) -> list[slice]:
    """The rows of a matrix in pieces that are widened to float32 at once."""
    rows, columns = matrix.shape
    elements = CHUNK_ELEMENTS if matrix.is_cpu else DEVICE_CHUNK_ELEMENTS
    size = max(1, elements // columns)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def quantize_int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in int8, with one scale per row: s = absmax / 127 (1 for a row of zeros), q = clamp(round(w / s)).

    All in float32; ties round to even.

    Args:
        weight: (N, K), float32, bfloat16 or float16; finite.

    Returns:
        The codes, int8 (N, K), -127 to 127, and the scales, float32 (N,).

    Raises:
        QuantizationError: another rank or dtype, an empty side, a NaN or an infinity.
    """
    weight = _floats("weight", weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    most = torch.full((), float(MOST_INT8), device=weight.device)  # By a number, some devices multiply by its inverse.
    for rows in row_chunks(weight):
        values = weight[rows].float()
        quotient = values.abs().amax(1) / most
        scale[rows] = torch.where(quotient == 0, torch.ones_like(quotient), quotient)
        codes[rows] = (values / scale[rows, None]).round().clamp(-MOST_INT8, MOST_INT8).to(torch.int8)
    if not bool(torch.isfinite(scale).all()):
        raise QuantizationError("weight holds NaN or infinity")
    return codes, scale


def _floats(name: str, weight: Tensor) -> Tensor:
    checks.given(**{name: weight})
    checks.floating(name, weight)
    checks.matrix(name, weight)
    return weight.detach()
