"""The product of two int8 matrices (W8A8); formulas in ``mixft.kernels.int8_matmul``."""

from math import prod

import torch
from torch import Tensor

from .activation import check_activation
from .registration import define_op
from .validation import check_bias, check_dtype, check_out_dtype, check_same_device

# The longest sum of int8 products that int32 always holds: 2^31 / 128^2, less one; with zero points 2^31 / (255 * 128).
MOST_TERMS = 2**17 - 1
MOST_AFFINE_TERMS = 65793


@define_op("int8_matmul", name="int8_matmul")
def _int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    """``act(a_scale * b_scale * ((a - a_zero_point) @ b.T) + bias)``, the product exact in int32 and the rest in FP32.

    Args:
        a: int8 [..., K].
        b: int8 [N, K].
        a_scale: FP32, one scale for all rows (0-d or 1 element) or one a row ([...] or [..., 1]).
        b_scale: FP32, one element, [N] or [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: torch.float16, torch.bfloat16 or torch.float32.
        a_zero_point: int32 in [-128, 127], what stands for zero in ``a``: one element, or one a row, as ``a_scale``.
        b_sum: int32 [N], ``b.sum(1)``, which zero points need; computed here when not given.

    Returns:
        [..., N] of ``out_dtype``. No gradient flows through int8 operands.

    Raises:
        TypeError: an operand, scale, zero point, sum or ``out_dtype`` of another dtype.
        ValueError: shapes that do not fit, K above 131,071 (65,793 with zero points), ``b_sum`` without zero points, an
            unknown activation, tensors on several devices.
    """
    check_dtype("a", a, (torch.int8,))
    check_dtype("b", b, (torch.int8,))
    check_dtype("a_scale", a_scale, (torch.float32,))
    most = MOST_TERMS if a_zero_point is None else MOST_AFFINE_TERMS
    if a.dim() and a.shape[-1] > most:
        raise ValueError(f"K must be at most {most}, or its sum could exceed int32; a has shape {tuple(a.shape)}")
    rows = check_operands(a, b, b_scale, bias, out_dtype)
    check_same_device(a=a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias, a_zero_point=a_zero_point, b_sum=b_sum)
    if a_zero_point is not None:
        check_dtype("a_zero_point", a_zero_point, (torch.int32,))
        a_zero_point = as_column("a_zero_point", a_zero_point, rows)
        b_sum = b.sum(1, dtype=torch.int32) if b_sum is None else check_row_sums("b_sum", b_sum, b)
    elif b_sum is not None:
        raise ValueError("b_sum serves zero points; give a_zero_point with it, or neither")
    out = _int8_matmul(
        a.reshape(rows, a.shape[-1]),
        b,
        as_column("a_scale", a_scale, rows),
        as_column("b_scale", b_scale, b.shape[0]),
        bias,
        check_activation(activation),
        out_dtype,
        a_zero_point,
        b_sum,
    )
    return out.view(*a.shape[:-1], b.shape[0])


def check_row_sums(name: str, row_sums: Tensor, b: Tensor) -> Tensor:
    """``row_sums`` contiguous; raise unless it is int32 [N] for ``b`` [N, K]."""
    check_dtype(name, row_sums, (torch.int32,))
    if row_sums.shape != b.shape[:1]:
        raise ValueError(f"{name} must have shape ({b.shape[0]},); it has shape {tuple(row_sums.shape)}")
    return row_sums.contiguous()


def check_operands(a: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> int:
    """Check what both products share; return the number of rows of ``a``."""
    check_dtype("b_scale", b_scale, (torch.float32,))
    check_out_dtype(out_dtype)
    if b.dim() != 2 or a.dim() < 1 or a.shape[-1] != b.shape[1]:
        raise ValueError(f"b must be [N, K] with the K of a [..., K]; a has shape {tuple(a.shape)}, b {tuple(b.shape)}")
    check_bias(bias, b.shape[0])
    return prod(a.shape[:-1])


def as_column(name: str, scale: Tensor, rows: int) -> Tensor:
    """``scale`` as [rows, 1]; a single scale is repeated by a stride of 0."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if scale.numel() == rows:
        return scale.reshape(rows, 1)
    raise ValueError(f"{name} must have 1 or {rows} elements; it has shape {tuple(scale.shape)}")
