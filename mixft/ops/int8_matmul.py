"""``int8_matmul`` (W8A8) and ``weight_only_matmul`` (W8A16); formulas in ``mixft.kernels.int8_matmul``."""

from math import prod

import torch
from torch import Tensor

from .activation import check_activation
from .registration import define_op, without_dispatch
from .validation import FLOATS, check_bias, check_dtype, check_out_dtype, check_same_device

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


@define_op("int8_matmul", name="weight_only_matmul")
def _weight_only_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
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
    rows = _check_operands(a, b, b_scale, bias, out_dtype)
    check_same_device(a=a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias, a_zero_point=a_zero_point, b_sum=b_sum)
    if a_zero_point is not None:
        check_dtype("a_zero_point", a_zero_point, (torch.int32,))
        a_zero_point = _as_column("a_zero_point", a_zero_point, rows)
        b_sum = b.sum(1, dtype=torch.int32) if b_sum is None else check_row_sums(b_sum, b)
    elif b_sum is not None:
        raise ValueError("b_sum serves zero points; give a_zero_point with it, or neither")
    out = _int8_matmul(
        a.reshape(rows, a.shape[-1]),
        b,
        _as_column("a_scale", a_scale, rows),
        _as_column("b_scale", b_scale, b.shape[0]),
        bias,
        check_activation(activation),
        out_dtype,
        a_zero_point,
        b_sum,
    )
    return out.view(*a.shape[:-1], b.shape[0])


def check_row_sums(row_sums: Tensor, b: Tensor) -> Tensor:
    """``row_sums`` contiguous; raise unless it is int32 [N] for ``b`` [N, K]."""
    check_dtype("b_sum", row_sums, (torch.int32,))
    if row_sums.shape != b.shape[:1]:
        raise ValueError(f"b_sum must have shape ({b.shape[0]},); it has shape {tuple(row_sums.shape)}")
    return row_sums.contiguous()


def weight_only_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(b_scale * (a @ b.T) + bias)`` with int8 ``b`` widened on the fly and an FP32 sum.

    Args:
        a: FP16, BF16 or FP32 [..., K].
        b: int8 [N, K].
        b_scale: FP32, one element, [N] or [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: torch.float16, torch.bfloat16 or torch.float32; None is the dtype of ``a``.

    Returns:
        [..., N] of ``out_dtype``. The gradient reaches ``a`` when there is no activation.

    Raises:
        TypeError: an operand, scale or ``out_dtype`` of another dtype.
        ValueError: shapes that do not fit, an unknown activation, tensors on several devices, or an activation while
            ``a`` requires grad.
    """
    out_dtype = a.dtype if out_dtype is None else out_dtype
    check_dtype("a", a, FLOATS)
    check_dtype("b", b, (torch.int8,))
    rows = _check_operands(a, b, b_scale, bias, out_dtype)
    check_same_device(a=a, b=b, b_scale=b_scale, bias=bias)
    wants_gradient = torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient:
        refuse_activation_gradient(activation)
    serve = _weight_only_matmul if wants_gradient else without_dispatch(_weight_only_matmul, a, b, b_scale, bias)
    out = serve(
        a.reshape(rows, a.shape[-1]),
        b,
        _as_column("b_scale", b_scale, b.shape[0]),
        bias,
        check_activation(activation),
        out_dtype,
    )
    return out.view(*a.shape[:-1], b.shape[0])


def call_frozen(op, x: Tensor, rows: Tensor, weight: Tensor, weight_scale: Tensor, bias, activation, *more) -> Tensor:
    """Call an op of a layer with a frozen int8 weight on ``rows``, those of ``x`` [..., K]; its result as [..., N].

    Raises:
        ValueError: an unknown activation, or one while a gradient is wanted.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient:
        refuse_activation_gradient(activation)
    serve = op if wants_gradient else without_dispatch(op, x, weight, weight_scale, bias)
    out = serve(rows, weight, weight_scale, bias, check_activation(activation), *more)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def refuse_activation_gradient(activation: str | None) -> None:
    """Raise ValueError for an ``activation`` whose gradient is wanted: the pre-activation is not kept."""
    if activation not in (None, "none"):
        raise ValueError(
            f"activation={activation!r} cannot be differentiated here; apply the activation to the result, or call "
            "under torch.no_grad()"
        )


def frozen_weight_gradient(grad_out: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad_out @ (weight * weight_scale)`` as ``dtype``, with no 16-bit copy of the weight.

    The rows of the transposed int8 weight have no scale of their own, so the scale goes into ``grad_out`` [M, N]: as
    its ratio to the largest, since gradients times scales of 1e-3 would vanish in FP16, and the largest in FP32 after.
    """
    if weight_scale.numel() == 0:
        return grad_out.new_zeros((grad_out.shape[0], weight.shape[1]), dtype=dtype)
    largest = weight_scale.amax().clamp(min=2.0**-126)
    scaled = (grad_out * (weight_scale.view(-1) / largest)).to(dtype)
    return _weight_only_matmul(scaled, weight.t(), largest.expand(weight.shape[1], 1), None, "none", dtype)


def save_frozen(ctx, inputs, output):
    """Keep what :func:`differentiate_frozen` needs of an op on (input, int8 weight, its scale, bias, ...)."""
    a, b, b_scale, bias = inputs[:4]
    ctx.others = len(inputs) - 4
    ctx.save_for_backward(b, b_scale)
    ctx.dtypes = a.dtype, None if bias is None else bias.dtype


def differentiate_frozen(ctx, grad_out: Tensor):
    """Gradients of such an op as if its input were not rounded: the input's and the bias's."""
    b, b_scale = ctx.saved_tensors
    a_dtype, bias_dtype = ctx.dtypes
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_a = frozen_weight_gradient(grad_out, b, b_scale, a_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad_out.sum(0, dtype=torch.float32).to(bias_dtype)
    return grad_a, None, None, grad_bias, *[None] * ctx.others


_weight_only_matmul.register_autograd(differentiate_frozen, setup_context=save_frozen)


def _check_operands(a, b, b_scale, bias, out_dtype) -> int:
    """Check what both products share; return the number of rows of ``a``."""
    check_dtype("b_scale", b_scale, (torch.float32,))
    check_out_dtype(out_dtype)
    if b.dim() != 2 or a.dim() < 1 or a.shape[-1] != b.shape[1]:
        raise ValueError(f"b must be [N, K] with the K of a [..., K]; a has shape {tuple(a.shape)}, b {tuple(b.shape)}")
    check_bias(bias, b.shape[0])
    return prod(a.shape[:-1])


def _as_column(name: str, scale: Tensor, rows: int) -> Tensor:
    """``scale`` as [rows, 1]; a single scale is repeated by a stride of 0."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if scale.numel() == rows:
        return scale.reshape(rows, 1)
    raise ValueError(f"{name} must have 1 or {rows} elements; it has shape {tuple(scale.shape)}")
