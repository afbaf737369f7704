"""A linear layer trained with int8 products, forward and backward.

With Q_r quantizing each row and Q_c each column (``mixft.ops.quantize``, symmetric), x [M, K] and weight w [N, K]::

    forward          y  = s_x[m] s_w[n] (Q_r(x) Q_r(w)^T) + bias          with x = s_x Q_r(x), w = s_w Q_r(w)
    input gradient   dx = s_1[m] (Q_r(dy s_w) Q_r(w))                     with dy s_w = s_1 Q_r(dy s_w)
    weight gradient  dw = s_2[n] (Q_c(dy s_x)^T Q_r(x))                   with dy s_x = s_2 Q_c(dy s_x)

A scale that runs along the summed dimension cannot leave the sum, so the backward folds s_w and s_x into dy before it
quantizes dy: both copies made in the forward serve again, and x is kept for the backward in int8.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .int8_matmul import FLOATS, int8_matmul
from .quantize import quantize
from .validation import check_bias, check_dtype, check_same_device


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_values, x_scale, _ = quantize(x)
        weight_values, weight_scale, _ = quantize(weight)
        ctx.save_for_backward(x_values, x_scale, weight_values, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return int8_matmul(x_values, weight_values, x_scale, weight_scale, bias, out_dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        one = x_scale.new_ones(1)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            values, scale, _ = quantize(grad_out * weight_scale.view(-1))
            grad_x = int8_matmul(values, weight_values.t(), scale, one, out_dtype=x_dtype)
        if ctx.needs_input_grad[1]:
            values, scale, _ = quantize(grad_out * x_scale, dim=0)
            grad_weight = int8_matmul(values.t(), x_values.t(), scale.view(-1), one, out_dtype=weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` whose three products, forward and backward, run in int8.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: FP16, BF16 or FP32 [N, K]; quantized in every call, so it may change between calls.
        bias: FP16, BF16 or FP32 [N].

    Returns:
        [..., N] of the dtype of ``x``. Differentiable once in all three arguments.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, tensors on several devices.
    """
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, FLOATS)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be [N, K] with the K of x [..., K]; x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    check_bias(bias, weight.shape[0])
    check_same_device(x=x, weight=weight, bias=bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return _Int8Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
