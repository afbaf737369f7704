"""A linear layer that trains with int8 products.

With Q_r quantizing each row and Q_c each column (``mixft.ops.quantize``, symmetric), x [M, K] and weight w [N, K],
training computes::

    forward          y  = s_x[m] s_w[n] (Q_r(x) Q_r(w)^T) + bias          with x = s_x Q_r(x), w = s_w Q_r(w)
    input gradient   dx = s_1[m] (Q_r(dy s_w) Q_r(w))                     with dy s_w = s_1 Q_r(dy s_w)
    weight gradient  dw = s_2[n] (Q_c(dy s_x)^T Q_r(x))                   with dy s_x = s_2 Q_c(dy s_x)

A scale that runs along the summed dimension cannot leave the sum, so the backward folds s_w and s_x into dy before it
quantizes dy: both copies made in the forward serve again, and x is kept for the backward in int8.

A gradient that is not to run in int8 is a product of 16-bit floats (see ``float_dtype``)::

    weight gradient  dw = dy^T (s_x Q_r(x))                               backward="weight_grad_16bit" and "16bit"
    input gradient   dx = dy w                                            backward="16bit"

Each op is a composition of the quantize and int8_matmul implementations of the tensor's device, registered whole so
that a layer costs one dispatch a direction.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixft.cpu.instruction_set import has_bf16_dot

from .int8_matmul import MOST_TERMS
from .int8_operands import check_layer, check_quantized, quantize_columns, quantize_rows, quantized_rows
from .quantize import LARGEST_SEED
from .registration import define_composition, is_transformed, needs_dispatch, server
from .validation import FLOATS, check_dtype

Backward = Literal["int8", "weight_grad_16bit", "16bit"]
# Not asked for in a function, which torch 2.6 could not compile.
BACKWARDS = get_args(Backward)

# The weight gradient sums over rows; more of them are summed in parts, since int32 holds no more products than this.
MOST_ROWS = MOST_TERMS // 64 * 64


def check_backward(backward: str) -> None:
    """Raise ValueError for a backward that there is not."""
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}; it is {backward!r}")


def float_dtype(x: Tensor) -> torch.dtype:
    """What products that stay in floats run in: 16 bits, but FP32 on a CPU where those would be slower than FP32."""
    if x.device.type == "cpu":
        return torch.bfloat16 if x.dtype != torch.float16 and has_bf16_dot() else torch.float32
    return torch.bfloat16 if x.dtype == torch.float32 else x.dtype


def _empty_output(x, weight, bias, x_values, x_scale, weight_values, weight_scale, seed, backward):
    return x.new_empty(x.shape[0], weight.shape[0])


@define_composition("training_int8_linear_forward", _empty_output)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_values: Tensor,
    x_scale: Tensor,
    weight_values: Tensor,
    weight_scale: Tensor,
    seed: Tensor | None,
    backward: str,
) -> Tensor:
    matmul = server(x.device)("int8_matmul", "int8_matmul")
    return matmul(x_values, weight_values, x_scale, weight_scale, bias, "none", x.dtype)


def _empty_gradients(
    grad_out,
    weight,
    x_values,
    x_scale,
    weight_values,
    weight_scale,
    seed,
    backward,
    weight_dtype,
    needs_x,
    needs_weight,
    needs_bias,
):
    weight_shape = (grad_out.shape[1], x_values.shape[1])
    return (
        grad_out.new_empty(x_values.shape if needs_x else 0),
        grad_out.new_empty(weight_shape if needs_weight else 0, dtype=weight_dtype),
        grad_out.new_empty(grad_out.shape[1] if needs_bias else 0, dtype=torch.float32),
    )


@define_composition("training_int8_linear_backward", _empty_gradients)
def _backward(
    grad_out: Tensor,
    weight: Tensor | None,
    x_values: Tensor,
    x_scale: Tensor,
    weight_values: Tensor | None,
    weight_scale: Tensor | None,
    seed: Tensor | None,
    backward: str,
    weight_dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    serve = server(grad_out.device)
    matmul = serve("int8_matmul", "int8_matmul")
    grad_x, grad_weight = grad_out.new_empty(0), grad_out.new_empty(0, dtype=weight_dtype)
    one = x_scale.new_ones(1, 1).expand(x_values.shape[1], 1)
    dtype = float_dtype(grad_out)
    if needs_x and needs_weight and backward == "int8" and len(grad_out) <= MOST_ROWS:
        values, scale, transposed, column_scale, grad_bias = serve("quantize_gradient", "quantize_gradient")(
            grad_out, x_scale.view(-1), weight_scale.view(-1), seed
        )
        grad_x = matmul(values, weight_values.t(), scale, one, None, "none", grad_out.dtype)
        grad_weight = matmul(transposed, x_values.t(), column_scale, one, None, "none", weight_dtype)
        return grad_x, grad_weight, grad_bias if needs_bias else grad_bias.new_empty(0)
    grad_bias = grad_out.sum(0, dtype=torch.float32) if needs_bias else grad_out.new_empty(0, dtype=torch.float32)
    if needs_x and backward == "16bit":
        grad_x = torch.mm(grad_out.to(dtype), weight.to(dtype)).to(grad_out.dtype)
    elif needs_x:
        values, scale = quantize_rows(serve, grad_out, weight_scale.view(-1), seed)
        grad_x = matmul(values, weight_values.t(), scale, one, None, "none", grad_out.dtype)
    if needs_weight and backward != "int8":
        x = serve("dequantize", "dequantize")(x_values.unsqueeze(-1), x_scale.unsqueeze(-1), None, dtype).squeeze(-1)
        grad_weight = torch.mm(grad_out.to(dtype).t(), x).to(weight_dtype)
    elif needs_weight:
        whole = len(grad_out) <= MOST_ROWS
        out_dtype = weight_dtype if whole else torch.float32
        seed = None if seed is None else seed ^ 1
        parts = []
        for rows in range(0, max(len(grad_out), 1), MOST_ROWS):
            part = slice(rows, rows + MOST_ROWS)
            values, scale = quantize_columns(serve, grad_out[part], x_scale[part].view(-1), seed)
            parts.append(matmul(values.t(), x_values[part].t(), scale, one, None, "none", out_dtype))
        grad_weight = parts[0] if whole else sum(parts).to(weight_dtype)
    return grad_x, grad_weight, grad_bias


def _save_for_backward(ctx, inputs, output):
    _, weight, bias, x_values, x_scale, weight_values, weight_scale, seed, backward = inputs
    if backward == "16bit":
        ctx.save_for_backward(weight, x_values, x_scale, None, None, None)
    else:
        ctx.save_for_backward(None, x_values, x_scale, weight_values, weight_scale, seed)
    ctx.backward = backward
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_with(backward, ctx, grad_out):
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight, grad_bias = backward(
        grad_out, *ctx.saved_tensors, ctx.backward, ctx.weight_dtype, needs_x, needs_weight, needs_bias
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        *[None] * 6,
    )


def _differentiate(ctx, grad_out):
    return _differentiate_with(_backward, ctx, grad_out)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


class _EagerInt8Linear(torch.autograd.Function):
    """The same without the dispatcher, which costs a small layer a third of its time."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward.without_dispatch[inputs[0].device.type](*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return _differentiate_with(_backward.without_dispatch[grad_out.device.type], ctx, grad_out.resolve_neg())


class _TransformedInt8Linear(torch.autograd.Function):
    """The same for the transforms of ``torch.func``, which do not take the gradient that an op was given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_for_backward(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return _differentiate(ctx, grad_out)


def training_int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backward: Backward = "int8",
    stochastic: bool = False,
    quantized_x: tuple[Tensor, Tensor] | None = None,
    quantized_weight: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias)`` whose products run in int8: the forward's always, the gradients' by choice.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: FP16, BF16 or FP32 [N, K].
        bias: FP16, BF16 or FP32 [N].
        backward: "int8" for both gradients; "weight_grad_16bit" for int8 in the gradient of ``x`` and floats in that of
            ``weight``; "16bit" for floats in both. Floats are those of ``x`` where it has 16 bits, else BF16; on a CPU
            FP32 for an FP16 ``x``, and everywhere without BF16 instructions.
        stochastic: round gradients up or down at random, so that their mean is kept (to 2^-16), with a seed drawn from
            torch's generator of x's device in the forward.
        quantized_x: what ``quantize(x.reshape(-1, K))`` gives, int8 values [M, K] and FP32 scale [M, 1], where the
            caller has them; None to quantize ``x``.
        quantized_weight: the same of ``weight``, [N, K] and [N, 1].

    Returns:
        [..., N] of the dtype of ``x``. Differentiable once in ``x``, ``weight`` and ``bias``, as if quantization had a
        gradient of one (straight-through).

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, those of quantized operands included, tensors on several devices, an unknown
            ``backward``.
    """
    check_dtype("weight", weight, FLOATS)
    check_backward(backward)
    rows = check_layer(x, weight, bias)
    x_values, x_scale = (
        quantized_rows(rows) if quantized_x is None else check_quantized("quantized_x", quantized_x, rows)
    )
    weight_values, weight_scale = (
        quantized_rows(weight)
        if quantized_weight is None
        else check_quantized("quantized_weight", quantized_weight, weight)
    )
    seed = None
    # Without gradients too: reentrant checkpointing computes the forward so at first, and draws the same once more.
    if stochastic and backward != "16bit":
        seed = torch.randint(LARGEST_SEED, (), device=x.device)
    serve = _forward if needs_dispatch(x, weight, bias) else _EagerInt8Linear.apply
    if is_transformed(x, weight, bias):
        serve = _TransformedInt8Linear.apply
    out = serve(rows, weight, bias, x_values, x_scale, weight_values, weight_scale, seed, backward)
    return out.view(*x.shape[:-1], weight.shape[0])
