"""Linear layers with int8 products: one that trains, and one with frozen int8 weights.

With Q_r quantizing each row and Q_c each column (``mixft.ops.quantize``, symmetric), x [M, K] and weight w [N, K],
training computes::

    forward          y  = s_x[m] s_w[n] (Q_r(x) Q_r(w)^T) + bias          with x = s_x Q_r(x), w = s_w Q_r(w)
    input gradient   dx = s_1[m] (Q_r(dy s_w) Q_r(w))                     with dy s_w = s_1 Q_r(dy s_w)
    weight gradient  dw = s_2[n] (Q_c(dy s_x)^T Q_r(x))                   with dy s_x = s_2 Q_c(dy s_x)

A scale that runs along the summed dimension cannot leave the sum, so the backward folds s_w and s_x into dy before it
quantizes dy: both copies made in the forward serve again, and x is kept for the backward in int8. A row or column that
holds a NaN or Inf gets a scale that is not finite, so that its results are not finite and loss scaling sees them.

Each op is a composition of the quantize and int8_matmul implementations of the tensor's device, registered whole so
that a layer costs one dispatch a direction.
"""

import torch
from torch import Tensor

from .activation import check_activation
from .int8_matmul import frozen_weight_gradient, refuse_activation_gradient
from .registration import composition, server
from .validation import FLOATS, check_bias, check_dtype, check_same_device

# The weight gradient sums over rows; more of them are summed in parts, since int32 holds no more products than this.
MOST_ROWS = 2**17 - 64


def _quantize_rows(serve, x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values, scale, _ = serve("quantize", "quantize")(x.unsqueeze(-1), True, None, factor, True)
    return values.view(x.shape), scale.view(-1, 1)


def _quantize_columns(serve, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    values, scale, _ = serve("quantize", "quantize")(x.unsqueeze(0), True, None, factor, True)
    return values.view(x.shape), scale.view(-1, 1)


@torch.library.custom_op("mixft::int8_linear_forward", mutates_args=())
@composition
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    serve = server(x.device)
    x_values, x_scale = _quantize_rows(serve, x)
    weight_values, weight_scale = _quantize_rows(serve, weight)
    y = serve("int8_matmul", "int8_matmul")(x_values, weight_values, x_scale, weight_scale, bias, "none", x.dtype)
    return y, x_values, x_scale, weight_values, weight_scale


@_forward.register_fake
def _(x, weight, bias):
    return (
        x.new_empty(x.shape[0], weight.shape[0]),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
        x.new_empty(weight.shape, dtype=torch.int8),
        x.new_empty((weight.shape[0], 1), dtype=torch.float32),
    )


@torch.library.custom_op("mixft::int8_linear_backward", mutates_args=())
@composition
def _backward(
    grad_out: Tensor,
    x_values: Tensor,
    x_scale: Tensor,
    weight_values: Tensor,
    weight_scale: Tensor,
    weight_dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    serve = server(grad_out.device)
    matmul = serve("int8_matmul", "int8_matmul")
    grad_x, grad_weight = grad_out.new_empty(0), grad_out.new_empty(0, dtype=weight_dtype)
    if needs_x:
        values, scale = _quantize_rows(serve, grad_out, weight_scale.view(-1))
        one = scale.new_ones(1, 1).expand(x_values.shape[1], 1)
        grad_x = matmul(values, weight_values.t(), scale, one, None, "none", grad_out.dtype)
    if needs_weight:
        one = x_scale.new_ones(1, 1).expand(x_values.shape[1], 1)
        whole = len(grad_out) <= MOST_ROWS
        out_dtype = weight_dtype if whole else torch.float32
        parts = []
        for rows in range(0, max(len(grad_out), 1), MOST_ROWS):
            part = slice(rows, rows + MOST_ROWS)
            values, scale = _quantize_columns(serve, grad_out[part], x_scale[part].view(-1))
            parts.append(matmul(values.t(), x_values[part].t(), scale, one, None, "none", out_dtype))
        grad_weight = parts[0] if whole else sum(parts).to(weight_dtype)
    return grad_x, grad_weight


@_backward.register_fake
def _(grad_out, x_values, x_scale, weight_values, weight_scale, weight_dtype, needs_x, needs_weight):
    return (
        grad_out.new_empty(x_values.shape if needs_x else 0),
        grad_out.new_empty(weight_values.shape if needs_weight else 0, dtype=weight_dtype),
    )


def _save_for_backward(ctx, inputs, output):
    _, weight, bias = inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, grad_out, *unused):
    if grad_out is None:
        return None, None, None
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_x, grad_weight = _backward(grad_out, *ctx.saved_tensors, ctx.weight_dtype, needs_x, needs_weight)
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_out.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None,
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


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
    check_dtype("weight", weight, FLOATS)
    rows = _check_layer(x, weight, bias)
    return _forward(rows, weight, bias)[0].view(*x.shape[:-1], weight.shape[0])


def _dynamic_linear_body(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    serve = server(x.device)
    values, scale = _quantize_rows(serve, x)
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
    rows = _check_layer(x, weight, bias)
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


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Check what both layers share; return ``x`` as rows."""
    check_dtype("x", x, FLOATS)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        shapes = f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"weight must be [N, K] with the K of x [..., K]; {shapes}")
    check_bias(bias, weight.shape[0])
    check_same_device(x=x, weight=weight, bias=bias)
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
