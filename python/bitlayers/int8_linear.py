"""`Int8Linear`: a linear layer of int8 codes with one scale per row, for output heads."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitcore.operators import checks, native
from bitlayers.bitlinear import (
    _MAX_OUT_FEATURES,
    MAX_IN_FEATURES,
    _check_shape,
    _check_values,
    _require_dtype,
    _require_flag,
    _require_plain,
    _require_size,
)
from bitlayers.packed_module import INT8_PARTS, PackedModule, check_int8, empty_int8, quantize_int8_rows, row_chunks


class Int8Linear(PackedModule):
    """A linear layer whose weight is int8 codes, times one float32 scale per row.

    y = dot(float32(x), float32(weight)) * weight_scale + bias, rounded once to y's dtype. The weight is widened to
    float32 a few rows at a time, never as a whole. It is frozen; x and bias receive gradients. A second derivative
    does not exist. Until a state is loaded the weight is zero.

    Args:
        in_features: Size of the last dimension of x.
        out_features: Size of the last dimension of y.
        bias: Whether a bias is added.
        dtype: Of the bias: float32, bfloat16 or float16.
        device: Where the tensors live.

    Attributes:
        weight: int8 (out_features, in_features), -127 to 127.
        weight_scale: float32 (out_features,), also through `half()` and `to(dtype)`.
        bias: (out_features,), or None.

    Raises:
        QuantizationError: a size that is no integer, below 1 or too large, a dtype that is none of the three.
    """

    parts = INT8_PARTS
    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        _require_size("in_features", in_features, MAX_IN_FEATURES)
        _require_size("out_features", out_features, _MAX_OUT_FEATURES)
        _require_flag("bias", bias)
        _require_dtype(dtype)
        super().__init__()
        self.in_features, self.out_features = int(in_features), int(out_features)
        self._hold(*empty_int8(self.out_features, self.in_features, device))
        zeros = torch.zeros(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The layer in int8 (see `quantize_int8_rows`), with the bias (not a copy of it) and mode of an `nn.Linear`.

        Raises:
            QuantizationError: the weight is not finite, or computed (pruning, `weight_norm`); the layer has hooks.
        """
        _require_plain(linear)
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer._hold(*quantize_int8_rows(linear.weight))
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Computes y.

        Args:
            input: (*, in_features), float32, bfloat16 or float16.

        Returns:
            (*, out_features), of input's dtype; under autocast of the autocast dtype.

        Raises:
            QuantizationError: input does not fit.
        """
        checks.given(input=input)
        checks.same_device("input", input, weight=self.weight, weight_scale=self.weight_scale, bias=self.bias)
        out_dtype = native.autocast_dtype(input)
        _, dtype = checks.linear(input, "weight", self.out_features, self.in_features, self.bias, out_dtype)
        return _linear(input, self.weight, self.weight_scale, self.bias, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            "weight=int8 per row"
        )

    def _check(self, prefix: str, codes: Tensor, scale: Tensor) -> None:
        check_int8(prefix, codes, scale, (self.out_features, self.in_features))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        if self.bias is not None and (bias := state_dict.get(prefix + "bias")) is not None:
            _check_values(prefix + "bias", bias)
            _check_shape(prefix + "bias", bias, (self.out_features,))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


# Operators of torch, so that compilers need not look into them: a graph would hold every chunk.


@torch.library.custom_op("bitlayers::int8_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out_features, in_features = weight.shape
    with native.autocast_off(x.device.type):
        columns = x.reshape(-1, in_features).float().t()
        y = columns.new_empty(out_features, columns.shape[1])
        for rows, part in _widened(weight):
            torch.mm(part, columns, out=y[rows])
        y *= weight_scale[:, None]
        if bias is not None:
            y += bias[:, None]
        return x.new_empty(columns.shape[1], out_features, dtype=dtype).copy_(y.t()).view(*x.shape[:-1], out_features)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@torch.library.custom_op("bitlayers::int8_linear_backward", mutates_args=())
def _input_gradient(gradient: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out_features, in_features = weight.shape
    with native.autocast_off(gradient.device.type):
        scaled = gradient.reshape(-1, out_features) * weight_scale
        result = scaled.new_zeros(len(scaled), in_features)
        for rows, part in _widened(weight):
            result.addmm_(scaled[:, rows], part)
        return result.to(dtype).view(*gradient.shape[:-1], in_features)


@_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1], dtype=dtype)


def _widened(weight: Tensor) -> Any:
    """The rows of int8 codes as float32, piece by piece in the same memory: each slice and its values."""
    chunks = row_chunks(weight)
    memory = torch.empty(chunks[0].stop, weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in chunks:
        yield rows, memory[: rows.stop - rows.start].copy_(weight[rows])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    weight, weight_scale = ctx.saved_tensors
    of_x = _input_gradient(gradient, weight, weight_scale, ctx.x_dtype) if ctx.needs_input_grad[0] else None
    of_bias = None
    if ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, None, of_bias, None


_linear.register_autograd(_backward, setup_context=_keep)
