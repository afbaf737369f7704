"""What the int8 layers share: the check of their arguments, and the quantization of one operand by row or column.

A row or column that holds a NaN or Inf gets a scale that is not finite, so that its results are not finite and loss
scaling sees them.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .quantize import _quantize
from .registration import without_dispatch
from .validation import FLOATS, check_bias, check_dtype, check_same_device


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of ``x`` [M, K] and FP32 scales [M, 1], outside of any op's body."""
    x = x.detach()
    values, scale, _ = without_dispatch(_quantize, x)(x.unsqueeze(-1), True, None, None, True)
    return values.view(x.shape), scale.view(-1, 1)


def quantize_rows(
    serve: Callable, x: Tensor, factor: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """int8 values of ``x`` [M, K] and FP32 scales [M, 1]; ``factor`` FP32 [K] multiplies each row first."""
    values, scale, _ = serve("quantize", "quantize")(x.unsqueeze(-1), True, seed, factor, True)
    return values.view(x.shape), scale.view(-1, 1)


def quantize_columns(serve: Callable, x: Tensor, factor: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values of ``x`` [M, N] and FP32 scales [N, 1]; ``factor`` FP32 [M] multiplies each column first."""
    values, scale, _ = serve("quantize", "quantize")(x.unsqueeze(0), True, seed, factor, True)
    return values.view(x.shape), scale.view(-1, 1)


def check_frozen_weight(weight: Tensor, weight_scale: Tensor) -> None:
    """Raise unless ``weight`` is int8 and ``weight_scale`` FP32 with one element a row, on one device."""
    check_dtype("weight", weight, (torch.int8,))
    check_dtype("weight_scale", weight_scale, (torch.float32,))
    if weight_scale.device != weight.device:
        check_same_device(weight=weight, weight_scale=weight_scale)
    if weight_scale.shape != (weight.shape[0], 1):
        raise ValueError(
            f"weight_scale must have shape ({weight.shape[0]}, 1); it has shape {tuple(weight_scale.shape)}"
        )


def check_quantized(name: str, quantized: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """``quantized``, its scale contiguous; raise unless it can be the int8 values and the scale of ``rows`` [M, K]."""
    values, scale = quantized
    check_dtype(f"the values of {name}", values, (torch.int8,))
    check_dtype(f"the scale of {name}", scale, (torch.float32,))
    if values.shape != rows.shape or scale.shape != (rows.shape[0], 1):
        raise ValueError(
            f"{name} must be values of shape {tuple(rows.shape)} and a scale of shape ({rows.shape[0]}, 1); they have "
            f"{tuple(values.shape)} and {tuple(scale.shape)}"
        )
    check_same_device(rows=rows, values=values, scale=scale)
    return values, scale.contiguous()


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Raise unless the arguments of a layer fit; return ``x`` as rows."""
    check_dtype("x", x, FLOATS)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        shapes = f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"weight must be [N, K] with the K of x [..., K]; {shapes}")
    check_bias(bias, weight.shape[0])
    if x.device != weight.device or (bias is not None and bias.device != weight.device):
        check_same_device(x=x, weight=weight, bias=bias)
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])
