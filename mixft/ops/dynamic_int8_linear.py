"""A linear layer with frozen int8 weights, whose input is quantized in every call; differentiable in its input.

One op, a composition of the quantize and int8_matmul implementations of the tensor's device, registered whole so that a
layer costs one dispatch.
"""

import torch
from torch import Tensor

from .activation import check_activation
from .int8_matmul import frozen_weight_gradient, refuse_activation_gradient
from .int8_operands import check_layer, quantize_rows
from .registration import composition, server
from .validation import check_dtype


def _dynamic_linear_body(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    serve = server(x.device)
    values, scale = quantize_rows(serve, x)
    return serve("int8_matmul", "int8_matmul")(values, weight, scale, weight_scale, bias, activation, x.dtype)


_dynamic_linear = torch.library.custom_op(
    "mixft::dynamic_int8_linear", composition(_dynamic_linear_body), mutates_args=()
)


@_dynamic_linear.register_fake
def _(x, weight, weight_scale, bias, activation):
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
    # Without a graph to build or to trace, the dispatcher would only add its 12 us, a third of a small layer.
    observed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    eager = type(x) is Tensor and not (wants_gradient or observed or torch.is_autocast_enabled(x.device.type))
    serve = _dynamic_linear_body if eager else _dynamic_linear
    out = serve(rows, weight, weight_scale, bias, check_activation(activation))
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
