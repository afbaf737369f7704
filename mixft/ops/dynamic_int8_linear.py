"""A linear layer with frozen int8 weights, whose input is quantized in every call; differentiable in its input."""

import torch
from torch import Tensor

from .activation import check_activation
from .int8_matmul import frozen_weight_gradient, refuse_activation_gradient
from .int8_operands import check_layer
from .registration import define_op, without_dispatch
from .validation import check_dtype


@define_op("dynamic_int8_linear", name="dynamic_int8_linear")
def _dynamic_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save_frozen(ctx, inputs, output):
    x, weight, weight_scale, bias, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype


def _differentiate_frozen(ctx, grad_out):
    x_dtype, bias_dtype = ctx.dtypes
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = frozen_weight_gradient(grad_out, *ctx.saved_tensors, x_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad_out.sum(0, dtype=torch.float32).to(bias_dtype)
    return grad_x, None, None, grad_bias, None


_dynamic_linear.register_autograd(_differentiate_frozen, setup_context=_save_frozen)


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
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Returns:
        [..., N] of the dtype of ``x``. The gradient of ``x`` is that of the layer without Q (straight-through).

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, an unknown activation, tensors on several devices, or an activation while
            a gradient is wanted.
    """
    check_dtype("weight", weight, (torch.int8,))
    check_dtype("weight_scale", weight_scale, (torch.float32,))
    rows = check_layer(x, weight, bias)
    if weight_scale.shape != (weight.shape[0], 1):
        raise ValueError(
            f"weight_scale must have shape ({weight.shape[0]}, 1); it has shape {tuple(weight_scale.shape)}"
        )
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient:
        refuse_activation_gradient(activation)
    serve = _dynamic_linear if wants_gradient else without_dispatch(_dynamic_linear, x)
    out = serve(rows, weight, weight_scale, bias, check_activation(activation))
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
