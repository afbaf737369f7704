"""A linear layer that trains with int8 products.

With Q_r quantizing each row and Q_c each column (``mixft.ops.quantize``, symmetric), x [M, K] and weight w [N, K],
training computes::

    forward          y  = s_x[m] s_w[n] (Q_r(x) Q_r(w)^T) + bias          with x = s_x Q_r(x), w = s_w Q_r(w)
    input gradient   dx = s_1[m] (Q_r(dy s_w) Q_r(w))                     with dy s_w = s_1 Q_r(dy s_w)
    weight gradient  dw = s_2[n] (Q_c(dy s_x)^T Q_r(x))                   with dy s_x = s_2 Q_c(dy s_x)

A scale that runs along the summed dimension cannot leave the sum, so the backward folds s_w and s_x into dy before it
quantizes dy: both copies made in the forward serve again, and x is kept for the backward in int8.

Each op is a composition of the quantize and int8_matmul implementations of the tensor's device, registered whole so
that a layer costs one dispatch a direction.
"""

import torch
from torch import Tensor

from .int8_matmul import MOST_TERMS
from .int8_operands import check_layer, quantize_columns, quantize_rows
from .registration import composition, server
from .validation import FLOATS, check_dtype

# The weight gradient sums over rows; more of them are summed in parts, since int32 holds no more products than this.
MOST_ROWS = MOST_TERMS // 64 * 64


@torch.library.custom_op("mixft::int8_linear_forward", mutates_args=())
@composition
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    serve = server(x.device)
    x_values, x_scale = quantize_rows(serve, x)
    weight_values, weight_scale = quantize_rows(serve, weight)
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
        values, scale = quantize_rows(serve, grad_out, weight_scale.view(-1))
        one = scale.new_ones(1, 1).expand(x_values.shape[1], 1)
        grad_x = matmul(values, weight_values.t(), scale, one, None, "none", grad_out.dtype)
    if needs_weight:
        one = x_scale.new_ones(1, 1).expand(x_values.shape[1], 1)
        whole = len(grad_out) <= MOST_ROWS
        out_dtype = weight_dtype if whole else torch.float32
        parts = []
        for rows in range(0, max(len(grad_out), 1), MOST_ROWS):
            part = slice(rows, rows + MOST_ROWS)
            values, scale = quantize_columns(serve, grad_out[part], x_scale[part].view(-1))
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
    rows = check_layer(x, weight, bias)
    return _forward(rows, weight, bias)[0].view(*x.shape[:-1], weight.shape[0])
