"""Constant-time checks of shapes, dtypes and devices, in Python: what fakes and TorchKernel validate and infer.

The compiled operators check the same things themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitcore.config import GROUP_SIZES
from bitcore.exceptions import KernelNotFoundError, QuantizationError

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
MAX_IN_FEATURES = 2**24 - 1
"""Above it an int32 sum of int8 products could overflow."""

MIN_TRAILER_BYTES = 64

STEP_CODES = {"2bit": 16, "1.6bit": 20}
"""The layouts of a packed weight, and how many codes each has in a 32-bit word."""

WORD_BYTES = 4


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


def require(condition: bool, message: str) -> None:
    """Raises QuantizationError(message) unless the condition holds."""
    if not condition:
        raise QuantizationError(message)


def described(value: object) -> str:
    """`None`, or `a list`: what somebody gave instead of a tensor."""
    return "None" if value is None else f"a {type(value).__name__}"


def given(situation: str = "", /, **arguments: object) -> None:
    """Every argument is a tensor. `situation` says why it is needed."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise QuantizationError(f"{name} is {described(value)}, expected a tensor{situation}")


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def packed_row_bytes(out_features: int, in_features: int, layout: str = "auto") -> tuple[int, int]:
    """Bytes of payload and of trailer for each output row of a packed weight."""
    return payload_row_bytes(in_features, chosen_layout(layout, in_features)), ceil_div(MIN_TRAILER_BYTES, out_features)


def payload_row_bytes(in_features: int, layout: str) -> int:
    """R of docs/packed-format.md."""
    return WORD_BYTES * ceil_div(in_features, STEP_CODES[layout])


def has_layout(layout: str, in_features: int) -> bool:
    """Whether a layout exists for so many columns: "2bit" always, "1.6bit" if it is smaller."""
    return layout == "2bit" or payload_row_bytes(in_features, layout) < payload_row_bytes(in_features, "2bit")


def chosen_layout(layout: str, in_features: int) -> str:
    """The layout that a name stands for; "auto" is "2bit" for every shape."""
    if layout == "auto":
        return "2bit"
    if layout not in STEP_CODES:
        raise QuantizationError(f'layout is "{layout}", expected "auto", "2bit" or "1.6bit"')
    if not has_layout(layout, in_features):
        raise QuantizationError(
            f'layout "{layout}" does not exist for {in_features} in_features: it would be no smaller than "2bit"'
        )
    return layout


def layout_of(qweight: Tensor, in_features: int) -> str | None:
    """The layout that a packed weight's size names; None where it is that of no layout."""
    out_features, row_bytes = qweight.shape
    for layout in STEP_CODES:
        if has_layout(layout, in_features) and row_bytes == sum(packed_row_bytes(out_features, in_features, layout)):
            return layout
    return None


def torch_kernel_only(kernel_name: str | None, device: torch.device) -> None:
    """Off the CPU, TorchKernel is the one built-in kernel."""
    if kernel_name not in (None, "TorchKernel"):
        raise KernelNotFoundError(f"{kernel_name} does not run on {device.type}; TorchKernel does")


def dense(name: str, tensor: Tensor) -> None:
    """One block of strided memory: neither sparse nor nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise QuantizationError(f"{name} is a {kind} tensor, expected a dense one")


def floating(name: str, tensor: Tensor) -> None:
    """A dense tensor of a dtype that quantization reads."""
    dense(name, tensor)
    require(
        tensor.dtype in FLOATING, f"{name} has dtype {name_of(tensor.dtype)}, expected float32, bfloat16 or float16"
    )


def codes(name: str, tensor: Tensor) -> None:
    """Dense int8 codes."""
    dense(name, tensor)
    require(tensor.dtype == torch.int8, f"{name} has dtype {name_of(tensor.dtype)}, expected int8")


def matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    """Rank 2, no side empty, in_features within bounds. Returns (out_features, in_features)."""
    require(tensor.ndim == 2, f"{name} has {tensor.ndim} dimensions, expected 2")
    rows, cols = tensor.shape
    require(rows >= 1, f"{name} has 0 out_features, expected at least 1")
    require(cols >= 1, f"{name} has 0 in_features, expected at least 1")
    require(cols <= MAX_IN_FEATURES, f"{name} has {cols} in_features, at most {MAX_IN_FEATURES} are supported")
    return rows, cols


def same_device(x_name: str, x: Tensor, /, **others: Tensor | None) -> None:
    """All tensors on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None:
            require(tensor.device == x.device, f"{name} is on {tensor.device}, {x_name} is on {x.device}")


def group_size(size: int, per_channel: bool) -> None:
    """0 (no groups), or a size that exists, where scales are not per channel."""
    require(size in (0, *GROUP_SIZES), f"group_size is {size}, expected 32, 64, 128 or 256")
    require(not (size and per_channel), f"group_size is {size}, and scales are per channel: expected one of the two")


def weight_scale_shape(out_features: int, in_features: int, per_channel: bool, group_size: int) -> list[int]:
    """() per tensor, (out_features,) per channel, (out_features, groups) per group."""
    if group_size:
        return [out_features, ceil_div(in_features, group_size)]
    return [out_features] if per_channel else []


def weight_scale_dtype(group_size: int) -> torch.dtype:
    """float32; float16 per group (group_size is not 0)."""
    return torch.float16 if group_size else torch.float32


def weight_scale(
    name: str, scale: Tensor, out_features: int, in_features: int, per_channel: bool, group_size: int
) -> None:
    """float32; any one element per tensor, (out_features,) or (out_features, 1) per channel.

    float16 (out_features, groups) per group.
    """
    dense(name, scale)
    dtype = weight_scale_dtype(group_size)
    require(scale.dtype == dtype, f"{name} has dtype {name_of(scale.dtype)}, expected {name_of(dtype)}")
    shape = tuple(scale.shape)
    if group_size:
        expected = tuple(weight_scale_shape(out_features, in_features, False, group_size))
        require(
            shape == expected,
            f"{name} has shape {shape}, expected {expected} for weights of {in_features} in_features in groups of "
            f"{group_size}",
        )
    elif per_channel:
        fits = shape == (out_features,) or shape == (out_features, 1)
        require(fits, f"{name} has shape {shape}, expected ({out_features},) for per_channel weights")
    else:
        require(scale.numel() == 1, f"{name} has shape {shape}, expected one element for per_tensor weights")


def x_scale_shape(x: Tensor, per_channel: bool, group_size: int = 0) -> list[int]:
    """() per tensor, (*, 1) per channel, (*, groups) per group."""
    if group_size:
        return [*x.shape[:-1], ceil_div(x.shape[-1], group_size)]
    return [*x.shape[:-1], 1] if per_channel else []


def x_scale(scale: Tensor, x: Tensor, per_channel: bool, group_size: int = 0) -> None:
    """float32; any one element per tensor, (*, 1) per channel, (*, groups) per group."""
    dense("scale", scale)
    require(scale.dtype == torch.float32, f"scale has dtype {name_of(scale.dtype)}, expected float32")
    shape = tuple(scale.shape)
    if per_channel or group_size:
        expected = tuple(x_scale_shape(x, per_channel, group_size))
        what = f"per_group activations in groups of {group_size}" if group_size else "per_channel activations"
        require(shape == expected, f"scale has shape {shape}, expected {expected} for {what}")
    else:
        require(scale.numel() == 1, f"scale has shape {shape}, expected one element for per_tensor activations")


def packed(qweight: Tensor, in_features: int) -> None:
    """A uint8 tensor of the size that packing gives."""
    dense("qweight", qweight)
    require(qweight.dtype == torch.uint8, f"qweight has dtype {name_of(qweight.dtype)}, expected uint8")
    out_features, row_bytes = matrix("qweight", qweight)
    require(
        1 <= in_features <= MAX_IN_FEATURES,
        f"in_features is {in_features}, expected at least 1 and at most {MAX_IN_FEATURES}",
    )
    if layout_of(qweight, in_features) is None:
        sizes = [
            str(sum(packed_row_bytes(out_features, in_features, layout)))
            for layout in STEP_CODES
            if has_layout(layout, in_features)
        ]
        raise QuantizationError(
            f"qweight has {row_bytes} bytes a row, expected {' or '.join(sizes)} for {out_features} out_features "
            f"and {in_features} in_features"
        )


def activations(name: str, x: Tensor) -> int:
    """A floating x of rank 1 or more, its width within bounds. Returns in_features."""
    floating(name, x)
    return _features(name, x)


def _features(name: str, x: Tensor) -> int:
    require(x.ndim >= 1, f"{name} has 0 dimensions, expected at least 1")
    features = x.shape[-1]
    require(features <= MAX_IN_FEATURES, f"{name} has {features} features, at most {MAX_IN_FEATURES} are supported")
    return features


def columns(name: str, x: Tensor) -> None:
    """Rank 1 or more, and something in each row, but not too much."""
    _features(name, x)
    require(x.shape[-1] >= 1, f"{name} has shape {tuple(x.shape)}, expected at least one column")


def linear(
    x: Tensor, weight_name: str, out_features: int, in_features: int, bias: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Sequence[int], torch.dtype]:
    """x, bias and out_dtype against a weight's sizes. Returns shape and dtype of y."""
    features = activations("x", x)
    require(features == in_features, f"x has {features} features, {weight_name} expects {in_features}")
    if bias is not None:
        floating("bias", bias)
        shape = tuple(bias.shape)
        require(shape == (out_features,), f"bias has shape {shape}, expected ({out_features},)")
    dtype = out_dtype or x.dtype
    require(dtype in FLOATING, f"out_dtype is {name_of(dtype)}, expected float32, bfloat16 or float16")
    return [*x.shape[:-1], out_features], dtype


def inference(
    x: Tensor,
    qweight_scale: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    weight_group_size: int,
    out_dtype: torch.dtype | None,
) -> tuple[Sequence[int], torch.dtype]:
    """All tensors of an inference call. Returns shape and dtype of y."""
    group_size(weight_group_size, weight_per_channel)
    same_device("x", x, qweight_scale=qweight_scale, qweight=qweight, bias=bias)
    features = activations("x", x)
    dense("qweight", qweight)
    require(
        qweight.dtype in (torch.uint8, torch.int8),
        f"qweight has dtype {name_of(qweight.dtype)}, expected uint8 (packed) or int8 (codes)",
    )
    out_features, in_features = matrix("qweight", qweight)
    if qweight.dtype == torch.uint8:
        require(features >= 1, f"x has {features} features, expected at least 1")
        packed(qweight, features)
        in_features = features
    weight_scale("qweight_scale", qweight_scale, out_features, in_features, weight_per_channel, weight_group_size)
    return linear(x, "qweight", out_features, in_features, bias, out_dtype)


def own_form(x: Tensor, bias: Tensor | None) -> Sequence[int | None]:
    """An inference call whose qweight its kernel alone can read.

    Returns y's shape; out_features is None where no bias tells it.
    """
    same_device("x", x, bias=bias)
    activations("x", x)
    if bias is not None:
        floating("bias", bias)
        require(bias.ndim == 1, f"bias has {bias.ndim} dimensions, expected 1")
    return [*x.shape[:-1], None if bias is None else bias.shape[0]]


def returned(kernel_name: str, y: object, x: Tensor, shape: Sequence[int | None]) -> Tensor:
    """What a registered kernel returned: y, of x's dtype and on its device. A size that is None may be any."""
    if not isinstance(y, Tensor):
        raise QuantizationError(f"kernel {kernel_name} returned {described(y)}, expected a tensor")
    expected = tuple(actual if size is None else size for actual, size in zip(y.shape, shape, strict=False))
    if y.ndim != len(shape) or tuple(y.shape) != expected:
        wanted_shape = tuple("out_features" if size is None else size for size in shape)
        raise QuantizationError(f"kernel {kernel_name} returned y with shape {tuple(y.shape)}, expected {wanted_shape}")
    for what, actual, wanted in (("dtype", y.dtype, x.dtype), ("device", y.device, x.device)):
        require(actual == wanted, f"kernel {kernel_name} returned y with {what} {actual}, expected {wanted}")
    return y


def training(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Sequence[int], torch.dtype]:
    """All tensors of a training call. Returns shape and dtype of y."""
    same_device("x", x, weight=weight, bias=bias)
    floating("weight", weight)
    return linear(x, "weight", *matrix("weight", weight), bias, out_dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    x_scale: Tensor | None,
    qweight: Tensor | None,
    qweight_scale: Tensor | None,
    in_features: int,
    weight_per_channel: bool,
    weight_group_size: int,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
) -> None:
    """All tensors of a backward call.

    x: as the training forward kept it, int8 codes or floating. qweight: packed, int8 codes, or the floating weight.
    """
    group_size(weight_group_size, weight_per_channel)
    same_device("dy", dy, x=x, x_scale=x_scale, qweight=qweight, qweight_scale=qweight_scale)
    floating("dy", dy)
    require(dy.ndim >= 1, "dy has 0 dimensions, expected at least 1")
    if qweight is not None:
        _backward_weight(dy, qweight, qweight_scale, in_features, weight_per_channel, weight_group_size)
    if x is not None:
        _backward_x(dy, x, x_scale, in_features)
    require(dx_dtype is None or qweight is not None, "qweight is None, dx needs it")
    require(dweight_dtype is None or x is not None, "x is None, dweight needs it")


def _backward_weight(
    dy: Tensor,
    qweight: Tensor,
    qweight_scale: Tensor | None,
    in_features: int,
    per_channel: bool,
    weight_group_size: int,
) -> None:
    if qweight.dtype == torch.uint8:
        packed(qweight, in_features)
    else:
        if not qweight.is_floating_point():
            plain_codes(qweight)
        columns_found = matrix("qweight", qweight)[1]
        require(columns_found == in_features, f"qweight has {columns_found} columns, in_features is {in_features}")
    out_features = qweight.shape[0]
    require(dy.shape[-1] == out_features, f"dy has {dy.shape[-1]} columns, qweight has {out_features} rows")
    if qweight_scale is None:
        raise QuantizationError("qweight_scale is None, qweight needs it")
    weight_scale("qweight_scale", qweight_scale, out_features, in_features, per_channel, weight_group_size)


def _backward_x(dy: Tensor, x: Tensor, x_scale: Tensor | None, in_features: int) -> None:
    shape = (*dy.shape[:-1], in_features)
    require(tuple(x.shape) == shape, f"x has shape {tuple(x.shape)}, expected {shape}")
    if x.dtype != torch.int8:
        floating("x", x)
    elif x_scale is None:
        raise QuantizationError("x_scale is None, int8 codes need it")


def plain_codes(qweight: Tensor) -> None:
    """int8 codes, not a packed weight."""
    require(qweight.dtype != torch.uint8, "qweight is packed (uint8), expected int8 codes; unpack_weights returns them")
    codes("qweight", qweight)


def weight_and_scale(weight: Tensor, scale: Tensor, per_channel: bool, weight_group_size: int) -> None:
    """A floating weight (N, K) and its scale."""
    group_size(weight_group_size, per_channel)
    floating("weight", weight)
    same_device("weight", weight, scale=scale)
    weight_scale("scale", scale, *matrix("weight", weight), per_channel, weight_group_size)


def qweight_and_scale(qweight: Tensor, scale: Tensor, per_channel: bool, weight_group_size: int) -> None:
    """int8 codes (N, K) and their scale."""
    group_size(weight_group_size, per_channel)
    plain_codes(qweight)
    same_device("qweight", qweight, scale=scale)
    weight_scale("scale", scale, *matrix("qweight", qweight), per_channel, weight_group_size)


def x_of_scale(x: Tensor, int8_activations: bool) -> None:
    """A floating x (*, K) to take a scale from."""
    activations("x", x)
    if int8_activations:
        columns("x", x)


def x_and_scale(x: Tensor, scale: Tensor, per_channel: bool, x_group_size: int = 0, name: str = "x") -> None:
    """A floating x (*, K) and its scale."""
    group_size(x_group_size, per_channel)
    floating(name, x)
    columns(name, x)
    same_device(name, x, scale=scale)
    x_scale(scale, x, per_channel, x_group_size)


def qx_and_scale(qx: Tensor, scale: Tensor, per_channel: bool, x_group_size: int = 0) -> None:
    """int8 codes (*, K) and their scale."""
    group_size(x_group_size, per_channel)
    codes("qx", qx)
    columns("qx", qx)
    same_device("qx", qx, scale=scale)
    x_scale(scale, qx, per_channel, x_group_size)
