"""Activations in floats times an int8 weight (W8A16); formulas in ``mixft.kernels.int8_matmul``."""

import torch
from torch import Tensor

from .frozen_weight import call_frozen, register_gradient
from .int8_input_gradient import FrozenBackward
from .int8_matmul import as_column, check_operands
from .registration import define_op
from .validation import FLOATS, check_dtype, check_same_device


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


register_gradient(_weight_only_matmul, "exact")


def weight_only_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backward: FrozenBackward = "exact",
) -> Tensor:
    """``act(b_scale * (a @ b.T) + bias)`` with int8 ``b`` widened on the fly and an FP32 sum.

    Args:
        a: FP16, BF16 or FP32 [..., K].
        b: int8 [N, K].
        b_scale: FP32, one element, [N] or [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: torch.float16, torch.bfloat16 or torch.float32; None is the dtype of ``a``.
        backward: what the gradient of ``a`` is computed in: "exact" rounds the result's gradient to no other floats,
            the others are those of :func:`mixft.ops.dynamic_int8_linear`.

    Returns:
        [..., N] of ``out_dtype``. The gradient reaches ``a`` and ``bias`` when there is no activation.

    Raises:
        TypeError: an operand, scale or ``out_dtype`` of another dtype.
        ValueError: shapes that do not fit, an unknown activation or ``backward``, tensors on several devices, or an
            activation while ``a`` requires grad.
    """
    out_dtype = a.dtype if out_dtype is None else out_dtype
    check_dtype("a", a, FLOATS)
    check_dtype("b", b, (torch.int8,))
    rows = check_operands(a, b, b_scale, bias, out_dtype)
    check_same_device(a=a, b=b, b_scale=b_scale, bias=bias)
    scale = as_column("b_scale", b_scale, b.shape[0])
    a_rows = a.reshape(rows, a.shape[-1])
    return call_frozen(_weight_only_matmul, a, a_rows, b, scale, bias, activation, out_dtype, backward=backward)
