"""TorchKernel's operations: the whole contract in plain torch operations, for any device that torch has.

They are what the operators run where no native kernel exists, and an independent check of those that do. They never
synchronize a device except where a docstring says so: on a CPU wrong values raise, elsewhere every output is NaN.
Nothing here may be traced by a compiler, which could fuse or reorder what must be rounded step by step: that is why
they stand behind operators. Arguments and results are those of the operators of the same name (`native`).
"""

import torch
from torch import Tensor
from torch.nn import functional

from bitcore.operators import checks
from bitcore.operators import torch_packing as packing
from bitcore.operators.torch_packing import Fault, raise_faults

SCALE_FLOOR = 1e-5
GROUP_SCALE_FLOOR = 2.0**-14
MOST_GROUP_MEAN = 65504.0
"""The largest float16."""

_SUM_BLOCK = 4096
_SUM_LANES = 16
_EXACT_K = 131_071
"""Products of codes are at most 128 in magnitude: sums over this many stay below 2^24, exact in float32.

This holds in every reduced precision that torch may be told to use for float32 matmul: the codes have at most 8
significant bits, exact in bfloat16 and TF32 as well, and sums are kept in float32.
"""


# ---- scales and codes ------------------------------------------------------------------------------------------------


def compute_weight_scale(weight: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.group_size(group_size, per_channel)
    checks.floating("weight", weight)
    checks.matrix("weight", weight)
    rows = weight.float().abs()
    if group_size:
        return _group_scales(rows, group_size)
    total = _fixed_order_sum(rows if per_channel else rows.reshape(1, -1))
    mean = _divide(total, weight.numel() // len(total)).float()
    scale = torch.where(mean.isfinite(), mean.clamp(min=SCALE_FLOOR), torch.nan)
    return scale if per_channel else scale.view(())


def _group_scales(magnitudes: Tensor, group_size: int) -> Tensor:
    rows, cols = magnitudes.shape
    groups = checks.ceil_div(cols, group_size)
    padded = functional.pad(magnitudes, (0, groups * group_size - cols))
    total = _fixed_order_sum(padded.view(rows * groups, group_size)).view(rows, groups)
    counts = torch.full_like(total, group_size)
    counts[:, -1] = cols - (groups - 1) * group_size
    mean = (total / counts).float()
    return torch.where(mean <= MOST_GROUP_MEAN, mean.clamp(min=GROUP_SCALE_FLOOR), torch.nan).half()


def _of_elements(scale: Tensor, group_size: int, cols: int) -> Tensor:
    """Scales per group (*, groups), as float32 (*, cols)."""
    return scale.float().repeat_interleave(group_size, -1)[..., :cols]


def _fixed_order_sum(values: Tensor) -> Tensor:
    """float64 sum of each row of float32 (R, n) in the one order of docs/contract.md: (R,)."""
    while True:
        length = values.shape[1]
        block = min(_SUM_BLOCK, length + -length % _SUM_LANES)
        steps = (
            functional.pad(values, (0, -length % block))
            .view(len(values), -1, block // _SUM_LANES, _SUM_LANES)
            .unbind(2)
        )
        lanes = torch.zeros_like(steps[0], dtype=torch.float64)
        for step in steps:
            lanes += step
        for half in (8, 4, 2, 1):
            lanes = lanes[..., :half] + lanes[..., half:]
        values = lanes.squeeze(-1)
        if values.shape[1] == 1:
            return values.squeeze(1)


def _divide(values: Tensor, divisor: int) -> Tensor:
    # By a tensor: torch multiplies by the reciprocal of a plain number on some devices.
    return values / torch.full_like(values, divisor)


def compute_x_scale(x: Tensor, int8_activations: bool, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.group_size(group_size, per_channel)
    checks.x_of_scale(x, int8_activations)
    shape = checks.x_scale_shape(x, per_channel, group_size)
    if not int8_activations:
        return torch.ones(shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        absmax = torch.zeros(shape, dtype=torch.float32, device=x.device)
    else:
        magnitude = x.float().abs()
        if group_size:
            magnitude = functional.pad(magnitude, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
            absmax = magnitude.amax(-1)
        else:
            absmax = magnitude.amax(-1, keepdim=True) if per_channel else magnitude.amax()
    scale = _divide(absmax.clamp(min=SCALE_FLOOR), 127)
    return torch.where(absmax.isfinite(), scale, torch.nan)


def _quantize(values: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    codes = (values.float() / scale).round().clamp(lowest, highest)
    return codes.nan_to_num(0.0).to(torch.int8)


def _weight_scale_for(scale: Tensor, per_channel: bool, group_size: int, cols: int) -> Tensor:
    """(N, K), (N, 1) or (), to meet a weight (N, K)."""
    if group_size:
        return _of_elements(scale, group_size, cols)
    return scale.reshape(-1, 1) if per_channel else scale.reshape(())


def _x_scale_for(scale: Tensor, per_channel: bool, group_size: int, cols: int) -> Tensor:
    """(*, K), (*, 1) or (), to meet x (*, K)."""
    if group_size:
        return _of_elements(scale, group_size, cols)
    return scale if per_channel else scale.reshape(())


def quantize_weight(weight: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.weight_and_scale(weight, scale, per_channel, group_size)
    return _quantize(weight, _weight_scale_for(scale, per_channel, group_size, weight.shape[1]), -1, 1)


def dequantize_weight(qweight: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.qweight_and_scale(qweight, scale, per_channel, group_size)
    return qweight.float() * _weight_scale_for(scale, per_channel, group_size, qweight.shape[1])


def quantize_x(x: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.x_and_scale(x, scale, per_channel, group_size)
    return _quantize(x, _x_scale_for(scale, per_channel, group_size, x.shape[-1]), -128, 127)


def dequantize_x(qx: Tensor, scale: Tensor, per_channel: bool, group_size: int = 0) -> Tensor:
    checks.qx_and_scale(qx, scale, per_channel, group_size)
    return qx.float() * _x_scale_for(scale, per_channel, group_size, qx.shape[-1])


# ---- packing ---------------------------------------------------------------------------------------------------------


def prepare_weights(
    weight: Tensor, per_channel: bool, layout: str = "auto", group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Synchronizes the device: a weight that is not finite raises, and a group of too large ones."""
    scale = compute_weight_scale(weight, per_channel, group_size)
    faults = [Fault(~weight.isfinite().all(), "weight holds a NaN or an infinity")]
    if group_size:
        too_large = "weight holds magnitudes of a mean above 65504 in a group, which float16 cannot hold"
        faults.append(Fault(scale.isnan().any(), too_large))
    raise_faults(faults)
    return scale, pack_weights(quantize_weight(weight, scale, per_channel, group_size), layout)


def pack_weights(qweight: Tensor, layout: str = "auto") -> Tensor:
    """Synchronizes the device: an invalid code raises."""
    checks.plain_codes(qweight)
    _, in_features = checks.matrix("qweight", qweight)
    chosen = checks.chosen_layout(layout, in_features)
    raise_faults([_invalid_code(qweight)])
    return packing.pack(qweight, chosen)


def unpack_weights(qweight: Tensor, in_features: int, check: bool = True) -> Tensor:
    """Synchronizes the device where `check` asks to read every byte."""
    checks.packed(qweight, in_features)
    codes, faults = packing.unpack(qweight, in_features)
    if check:
        raise_faults(faults + packing.integrity_faults(qweight, in_features))
    return codes


def check_qweight(qweight: Tensor, in_features: int) -> None:
    """Synchronizes the device."""
    unpack_weights(qweight, in_features)


def _invalid_code(codes: Tensor) -> Fault:
    return Fault(((codes < -1) | (codes > 1)).any(), "qweight holds a code that is not -1, 0 or 1")


def _unusable_scale(scale: Tensor) -> Fault:
    usable = (scale > 0) & scale.isfinite()
    return Fault(~usable.all(), "qweight_scale holds a value that is not finite and positive")


def _nan_where_found(faults: list[Fault], values: Tensor) -> Tensor:
    """A copy of the values; all NaN where a fault is found, so that nothing synchronizes."""
    return values.masked_fill(torch.stack([fault.found for fault in faults]).any(), torch.nan)


def checked_scale(qweight_scale: Tensor, qweight: Tensor, in_features: int) -> Tensor:
    """A copy of the scale after a check, in constant time for each row, of its values and of qweight's trailer."""
    checks.packed(qweight, in_features)
    faults = [*packing.trailer_faults(qweight, in_features), _unusable_scale(qweight_scale)]
    if qweight.device.type == "cpu":
        raise_faults(faults)
    return _nan_where_found(faults, qweight_scale)


# ---- the linear layer ------------------------------------------------------------------------------------------------


def bitlinear(
    x: Tensor,
    qweight_scale: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    int8_activations: bool,
    x_per_channel: bool,
    out_dtype: torch.dtype | None = None,
    kernel_name: str | None = None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> Tensor:
    _, dtype = checks.inference(x, qweight_scale, qweight, bias, weight_per_channel, group_size, out_dtype)
    checks.torch_kernel_only(kernel_name, x.device)
    if qweight.dtype == torch.int8:
        codes, faults = qweight, [_invalid_code(qweight)]
    else:
        codes, faults = packing.unpack(qweight, x.shape[-1])
    faults.append(_unusable_scale(qweight_scale))
    if x.device.type == "cpu":
        raise_faults(faults)
    qx, x_scale = _quantized_x(x, int8_activations, x_per_channel, group_size if x_per_group else 0)
    y = _linear(qx, x_scale, codes, qweight_scale, bias, weight_per_channel, group_size)
    return _nan_where_found(faults, y).to(dtype)


def bitlinear_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    int8_activations: bool,
    x_per_channel: bool,
    out_dtype: torch.dtype | None = None,
    kernel_name: str | None = None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, dtype = checks.training(x, weight, bias, out_dtype)
    checks.torch_kernel_only(kernel_name, x.device)
    qweight_scale = compute_weight_scale(weight, weight_per_channel, group_size)
    codes = quantize_weight(weight, qweight_scale, weight_per_channel, group_size)
    qx, x_scale = _quantized_x(x, int8_activations, x_per_channel, group_size if x_per_group else 0)
    y = _linear(qx, x_scale, codes, qweight_scale, bias, weight_per_channel, group_size).to(dtype)
    if not int8_activations:
        qx, x_scale = qx.new_empty(0, dtype=torch.int8), x_scale.new_empty(0)
    return y, qx, x_scale, packing.pack(codes), qweight_scale


def _quantized_x(x: Tensor, int8_activations: bool, per_channel: bool, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and their scale; float32 activations: x in float32, and 1, or NaN for a row that is not finite."""
    if int8_activations:
        scale = compute_x_scale(x, True, per_channel, group_size)
        return _quantize(x, _x_scale_for(scale, per_channel, group_size, x.shape[-1]), -128, 127), scale
    wide = x.float()
    scale = compute_x_scale(x, False, True)
    return wide, scale.masked_fill(~wide.isfinite().all(-1, keepdim=True), torch.nan)


def _linear(
    qx: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_per_channel: bool,
    group_size: int,
) -> Tensor:
    """float32 y = sum * (s_x * s_w) + bias: three operations, none fused; of groups their sum, in order, from 0."""
    multiply = _integer_matmul if qx.dtype == torch.int8 else _float_matmul
    if group_size:
        y = torch.zeros((*qx.shape[:-1], len(codes)), dtype=torch.float32, device=qx.device)
        x_parts, w_parts = qx.split(group_size, -1), codes.split(group_size, -1)
        for group, (x_part, w_part) in enumerate(zip(x_parts, w_parts, strict=True)):
            s_x = x_scale[..., group : group + 1] if x_scale.ndim and x_scale.shape[-1] > 1 else x_scale
            y = y + multiply(x_part, w_part) * (s_x * weight_scale[:, group].float())
    else:
        y = multiply(qx, codes) * (x_scale * weight_scale.reshape(-1 if weight_per_channel else ()))
    return y if bias is None else y + bias.float()


def _float_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """float32 of the float64 sums of x (*, K) times codes (N, K), transposed.

    In float64 neither the order in which torch adds, which changes with the number of rows, nor TF32 shows.
    """
    return functional.linear(x.double(), codes.double()).float()


def _integer_matmul(qx: Tensor, codes: Tensor) -> Tensor:
    """float32 of the exact integer sums of qx (*, K) times codes (N, K), transposed."""
    blocks = [
        functional.linear(x_block.float(), w_block.float())
        for x_block, w_block in zip(qx.split(_EXACT_K, -1), codes.split(_EXACT_K, -1), strict=True)
    ]
    if len(blocks) == 1:
        return blocks[0] + 0.0  # An integer zero has no sign; a sum of products with 0 may be -0.0.
    return torch.stack([block.to(torch.int32) for block in blocks]).sum(0, dtype=torch.int32).float()


# ---- backward --------------------------------------------------------------------------------------------------------
#
# torch's own matmuls with the integer codes, which every floating dtype holds exactly, the scales folded into dY; where
# weights have them per group, scales go into the codes, and the products are rounded once. In float32, but in bfloat16
# (with float32 sums) where dY is bfloat16, which it is under autocast.


def bitlinear_backward(
    dy: Tensor,
    x: Tensor | None,
    x_scale: Tensor | None,
    qweight: Tensor | None,
    qweight_scale: Tensor | None,
    in_features: int,
    weight_per_channel: bool,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    group_size: int = 0,
    x_per_group: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = dx_dtype, dweight_dtype
    checks.backward(dy, x, x_scale, qweight, qweight_scale, in_features, weight_per_channel, group_size, *wanted)
    nothing = dy.new_empty(0, dtype=torch.float32)
    dx = dweight = dbias = nothing
    rows = dy.reshape(-1, dy.shape[-1])
    if dx_dtype is not None:
        assert qweight is not None
        assert qweight_scale is not None
        if qweight.is_floating_point():
            qweight = quantize_weight(qweight, qweight_scale, weight_per_channel, group_size)
        codes = _codes_as(torch.float32 if group_size else _matmul_dtype(dy), qweight, in_features)
        if group_size:
            weight = codes * _of_elements(qweight_scale, group_size, in_features)
            dx = (dy.to(_matmul_dtype(dy)) @ weight.to(_matmul_dtype(dy))).to(dx_dtype)
        else:
            dx = _scaled_matmul(dy, codes, qweight_scale.reshape(-1 if weight_per_channel else ())).to(dx_dtype)
    if dweight_dtype is not None:
        assert x is not None
        if group_size and x.dtype == torch.int8:
            assert x_scale is not None
            s_x = _of_elements(x_scale, group_size, in_features) if x_per_group else x_scale
            values = (x.float() * s_x).reshape(-1, in_features).to(_matmul_dtype(dy))
            dweight = (rows.t().to(values.dtype) @ values).to(dweight_dtype)
        else:
            dweight = _dweight(rows, x.reshape(-1, in_features), x_scale).to(dweight_dtype)
    if dbias_dtype is not None:
        dbias = rows.float().sum(0).to(dbias_dtype)
    return dx, dweight, dbias


def _dweight(rows: Tensor, x: Tensor, x_scale: Tensor | None) -> Tensor:
    if x.dtype != torch.int8:
        return rows.float().t() @ x.float()
    assert x_scale is not None
    return _scaled_matmul(rows.t(), x.to(_matmul_dtype(rows)), x_scale.reshape(-1 if x_scale.ndim > 0 else ()))


def _codes_as(dtype: torch.dtype, qweight: Tensor, in_features: int) -> Tensor:
    """As numbers, without a look at checksum and codes."""
    codes = qweight if qweight.dtype == torch.int8 else unpack_weights(qweight, in_features, False)
    return codes.to(dtype)


def _matmul_dtype(dy: Tensor) -> torch.dtype:
    return torch.bfloat16 if dy.dtype == torch.bfloat16 else torch.float32


def _scaled_matmul(left: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(left * scale) @ codes in the dtype of the codes. scale: (), or one for each column of left."""
    return (left.float() * scale).to(codes.dtype) @ codes
