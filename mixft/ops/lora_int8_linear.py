"""A layer with a frozen int8 weight and a LoRA adapter beside it, whose products run inside those of the layer.

    y = s w_scale (Q(x) w^T) + bias + (scaling x A^T) B^T       A [rank, K], B [N, rank]

(Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.) Both directions add a product of rank columns
to one of bytes before anything is stored: the output in the forward, the gradient of x in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dynamic_int8_linear import _dynamic_linear, dynamic_int8_linear
from .int8_input_gradient import FrozenBackward, check_frozen_backward, input_gradient
from .int8_operands import check_frozen_weight, check_layer
from .registration import needs_dispatch, without_autocast
from .validation import check_same_device


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, weight_scale, bias, a, b, scaling, backward):
        left = torch.mm(x, a.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, weight_scale, a, b, left)
        ctx.scaling, ctx.products, ctx.bias_dtype = scaling, backward, None if bias is None else bias.dtype
        serve = _dynamic_linear.without_dispatch[x.device.type]
        return serve(x, weight, weight_scale, bias, "none", left, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight, weight_scale, a, b, left = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:6]
        grad_x = grad_bias = grad_a = grad_b = None
        grad_left = torch.mm(grad_out, b).mul_(ctx.scaling)
        if needs_x:
            grad_x = input_gradient(grad_out, weight, weight_scale, ctx.products, grad_left, a)
        if needs_bias:
            grad_bias = grad_out.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        if needs_a:
            grad_a = torch.mm(grad_left.t(), x)
        if needs_b:
            # The other way round takes a CPU several times as long.
            grad_b = torch.mm(left.t(), grad_out).t()
        return grad_x, None, None, grad_bias, grad_a, grad_b, None, None


def lora_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    backward: FrozenBackward = "int8",
) -> Tensor:
    """``dynamic_int8_linear(x, weight, weight_scale, bias) + scaling * F.linear(F.linear(x, a), b)``.

    Where more than the implementation has to see the products, as under a compiler, these are three calls.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        a: [rank, K] of the dtype of ``x``.
        b: [N, rank] of the dtype of ``x``.
        scaling: a number.
        backward: what the gradient of ``x`` through ``weight`` is computed in; see
            :func:`mixft.ops.dynamic_int8_linear`. Those of ``a`` and ``b`` take the dtype of ``x``.

    Returns:
        [..., N] of the dtype of ``x``, differentiable once in ``x``, ``bias``, ``a`` and ``b``.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, tensors on several devices, or an unknown ``backward``.
    """
    check_frozen_backward(backward)
    check_frozen_weight(weight, weight_scale)
    rows = check_layer(x, weight, bias)
    check_same_device(x=x, a=a, b=b)
    if a.dtype != x.dtype or b.dtype != x.dtype:
        raise TypeError(f"a and b must be of the dtype of x; they are {a.dtype}, {b.dtype} and {x.dtype}")
    if a.dim() != 2 or a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], a.shape[0]):
        shapes = f"{tuple(a.shape)}, b {tuple(b.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"a must be [rank, K] and b [N, rank] for weight [N, K]; a has shape {shapes}")
    if needs_dispatch(x, weight, weight_scale, bias, a, b):
        adapted = F.linear(F.linear(x, a), b)
        return dynamic_int8_linear(x, weight, weight_scale, bias, backward=backward) + scaling * adapted
    operands = rows, weight, weight_scale, bias, a, b, scaling, backward
    out = without_autocast(x.device.type, _LoraLinear.apply, operands)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
