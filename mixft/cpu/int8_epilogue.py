"""What follows an integer product on the CPU: scales, zero points and bias in one pass over it."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .activation import ACTIVATIONS, finish_product

# Up to this many elements a call costs more than the memory that it saves.
SMALL = 1 << 16

compiled = native.Routine("int8_epilogue", c_void_p, *[c_int64] * 2, *[c_void_p] * 5, c_int, c_void_p, c_int)


def apply_int8_epilogue(
    product: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    """``act(a_scale b_scale (product - a_zero_point b_sum) + bias)`` as ``out_dtype``.

    Args:
        product: int32 [M, N], contiguous; its memory may become the result's.
        a_scale: FP32 [M, 1], any strides.
        b_scale: FP32 [N, 1], any strides.
        bias: floating [N] or None.
        activation: a name of ``activation.py``.
        out_dtype: FP16, BF16 or FP32.
        a_zero_point: int32 [M, 1], any strides, or None.
        b_sum: int32 [N], with zero points.
    """
    one_column_scale = b_scale.stride(0) == 0 and b_scale.shape[0] > 0
    if one_column_scale:
        a_scale = a_scale * b_scale[:1]
    if native.available():
        out = _scaled(
            product, a_scale, None if one_column_scale else b_scale, bias, activation, out_dtype, a_zero_point, b_sum
        )
        return finish_product(out, activation, out_dtype)[0]
    if a_zero_point is not None:
        product.addcmul_(a_zero_point, b_sum, value=-1)
    out = _in_place_float(product)
    if not one_column_scale:
        out.mul_(b_scale.t())
    out = out.mul_(a_scale) if bias is None else torch.addcmul(bias.float(), out, a_scale, out=out)
    return ACTIVATIONS[activation](out).to(out_dtype)


def _scaled(
    product: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> Tensor:
    """All but the activation, whose input stays in FP32."""
    in_place = activation != "none" or out_dtype == torch.float32
    out = product.view(torch.float32) if in_place else product.new_empty(product.shape, dtype=out_dtype)
    parts = [a_scale, b_scale, a_zero_point, b_sum, bias]
    # Held until the call returns.
    parts = [None if part is None else part.contiguous() for part in parts]
    compiled(
        product.data_ptr(),
        *product.shape,
        *map(native.address, parts[:-1]),
        *native.typed(parts[-1]),
        *native.typed(out),
    )
    return out


def _in_place_float(accumulator: Tensor) -> Tensor:
    """Convert int32 to FP32 in the same memory: element for element, one pass and no second buffer."""
    if accumulator.numel() <= SMALL:
        return accumulator.float()
    return accumulator.view(torch.float32).copy_(accumulator)
