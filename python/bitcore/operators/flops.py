"""What `torch.utils.flop_counter.FlopCounterMode` counts: as much as for a float layer of the same shape."""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _matmul(rows: Shape, in_features: int, out_features: int) -> int:
    return 2 * prod(rows) * in_features * out_features


def _inference(x: Shape, scale: Shape, qweight: Shape, *args: Any, **kwargs: Any) -> int:
    return _matmul(x[:-1], x[-1], qweight[0])


def _training(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return _matmul(x[:-1], x[-1], weight[0])


def _backward(
    dy: Shape,
    x: Shape | None,
    x_scale: Shape | None,
    qweight: Shape | None,
    qweight_scale: Shape | None,
    in_features: int,
    weight_per_channel: bool,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    matmuls = (dx_dtype is not None) + (dweight_dtype is not None)
    return matmuls * _matmul(dy[:-1], in_features, dy[-1])


def register() -> None:
    """Tells torch's counter about the operators."""
    operators = torch.ops.bitcore
    register_flop_formula([operators.bitlinear, operators.torch_bitlinear])(_inference)
    register_flop_formula([operators.bitlinear_train, operators.torch_bitlinear_train])(_training)
    register_flop_formula([operators.bitlinear_backward])(_backward)
