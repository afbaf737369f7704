"""CPU routine of the layer with frozen int8 weights whose input has one scale and zero point, found beforehand."""

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .int8_layer import int8_layer, serves
from .int8_matmul import int8_matmul
from .packed_weight import ZERO, packed_layer, packed_weight
from .quantize import UNIT_ROUNDER, number, workspace


def static_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight_sum: Tensor,
) -> Tensor:
    """``mixft.kernels.static_int8_linear.static_int8_linear`` on the CPU."""
    scale, zero_point = input_scale.item(), input_zero_point.item()
    if x.numel() and weight.numel() and serves(x.shape[0]):
        return int8_layer(x, weight, weight_scale, bias, activation, scale, zero_point, weight_sum)
    packed = packed_weight(weight) if x.numel() else None
    if packed is None:
        values = static_bytes(x, scale, zero_point, torch.int8)
        scales, zero_points = (column.view(1, 1).expand(len(x), 1) for column in (input_scale, input_zero_point))
        return int8_matmul(values, weight, scales, weight_scale, bias, activation, x.dtype, zero_points, weight_sum)
    zero_point += ZERO
    values = static_bytes(x, scale, zero_point, torch.uint8)
    out = packed_layer(values, packed, weight_scale, bias, scale, zero_point)
    return ACTIVATIONS[activation](out).to(x.dtype)


def static_bytes(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """``round(x / scale + zero_point)`` in the range of ``dtype``, int8 or uint8; NaN counts as zero."""
    limits = torch.iinfo(dtype)
    rounded = workspace(x.numel()).view(x.shape)
    torch.add(number(UNIT_ROUNDER + zero_point), x.float(), alpha=1 / scale, out=rounded)
    rounded.nan_to_num_(UNIT_ROUNDER + zero_point).clamp_(UNIT_ROUNDER + limits.min, UNIT_ROUNDER + limits.max)
    return torch.empty(x.shape, dtype=dtype, device="cpu").copy_(rounded.view(torch.int32))
