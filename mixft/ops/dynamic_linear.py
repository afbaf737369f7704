"""A linear layer with int8 weights whose activations are quantized as they come, one scale a row."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .int8_matmul import FLOATS, frozen_weight_gradient, int8_matmul, refuse_activation_gradient
from .quantize import quantize
from .validation import check_dtype


class _DynamicLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return _product(x, weight, weight_scale, bias, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        weight, weight_scale = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            rows = grad_out.reshape(-1, grad_out.shape[-1])
            grad_x = frozen_weight_gradient(rows, weight, weight_scale, x_dtype)
            grad_x = grad_x.view(*grad_out.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            grad_bias = grad_out.sum(tuple(range(grad_out.dim() - 1)), dtype=torch.float32).to(bias_dtype)
        return grad_x, None, None, grad_bias


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(F.linear(Q(x), weight * weight_scale, bias))`` with Q the symmetric int8 quantization of each row.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32, one element, [N] or [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Returns:
        [..., N] of the dtype of ``x``. The gradient of ``x`` is that of the layer without Q (straight-through).

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, an unknown activation, tensors on several devices, or an activation while
            ``x`` requires grad.
    """
    check_dtype("x", x, FLOATS)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient:
        refuse_activation_gradient(activation)
        return _DynamicLinear.apply(x, weight, weight_scale, bias)
    return _product(x, weight, weight_scale, bias, activation)


def _product(x, weight, weight_scale, bias, activation):
    values, scale, _ = quantize(x)
    return int8_matmul(values, weight, scale, weight_scale, bias, activation, x.dtype)
