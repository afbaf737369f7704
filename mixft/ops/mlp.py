"""``mixft.ops.mlp``: two linear layers with an activation between them, differentiated as one.

    preactivation = x @ weight1.t() + bias1
    hidden = activation(preactivation)
    out = hidden @ weight2.t() + bias2 + residual

Apart, the layers write the gradient of ``hidden`` and read it again to multiply it by the activation's slope. Here the
product that makes it does so on its FP32 sum, and adds up the gradient of ``bias1`` from the same tiles::

    grad_preactivation = (grad @ weight2) * activation'(preactivation)
    grad_bias1 = sum over rows of grad_preactivation
"""

import math

import torch
from torch import Tensor

from .activation import check_activation
from .activation_backward import column_sums
from .matmul import (
    check_added,
    in_backward,
    matmul,
    matmul_activation_backward,
    matmul_forward,
    product,
    refuse_second_derivative,
    wants_gradient,
)
from .registration import is_transformed, without_dispatch
from .validation import FLOATS, check_dtype, check_same_device


def layers(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is between the layers, its pre-activation, empty unless to be kept, and the result."""
    forward = without_dispatch(matmul_forward, x, weight1, bias1, weight2, bias2, residual)
    hidden, preactivation = forward(x, weight1.t(), bias1, activation, x.dtype, keep, None)
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return hidden, preactivation, forward(hidden, weight2.t(), bias2, "none", out_dtype, False, residual)[0]


class FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, activation, residual):
        needs_x, needs_weight1, needs_bias1, needs_weight2, *_ = ctx.needs_input_grad
        ctx.needs_first = needs_x or needs_weight1 or needs_bias1
        keep = ctx.needs_first and activation != "relu"
        hidden, preactivation, out = layers(x, weight1, bias1, weight2, bias2, activation, residual, keep)
        # ReLU's slope can be read from its output.
        kept = hidden if activation == "relu" else preactivation
        ctx.save_for_backward(
            x if needs_weight1 else None,
            weight1 if needs_x else None,
            weight2 if ctx.needs_first else None,
            hidden if needs_weight2 else None,
            kept if ctx.needs_first else None,
        )
        ctx.activation = activation
        ctx.dtype = x.dtype
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bias1, bias2)]
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("mlp")
        x, weight1, weight2, hidden, kept = ctx.saved_tensors
        needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2, _, needs_residual = ctx.needs_input_grad
        grads = dict.fromkeys(("x", "weight1", "bias1", "weight2", "bias2"))
        lead = grad.shape[:-1]
        flat = grad.reshape(math.prod(lead), grad.shape[-1])
        if needs_bias2:
            grads["bias2"] = column_sums(flat).to(ctx.bias_dtypes[1])
        flat = flat.to(ctx.dtype)
        multiply = in_backward(matmul_forward, flat, x, weight1, weight2, hidden)
        if needs_weight2:
            grads["weight2"] = product(multiply, flat.t(), hidden.reshape(flat.shape[0], hidden.shape[-1]))
        if ctx.needs_first:
            kept = kept.reshape(flat.shape[0], kept.shape[-1])
            multiply_by_slope = in_backward(matmul_activation_backward, flat, weight2, kept)
            grad_preactivation, bias1 = multiply_by_slope(flat, weight2, kept, ctx.activation, needs_bias1)
            if needs_bias1:
                grads["bias1"] = bias1.to(ctx.bias_dtypes[0])
            if needs_x:
                grads["x"] = product(multiply, grad_preactivation, weight1).view(*lead, weight1.shape[1])
            if needs_weight1:
                rows = x.reshape(flat.shape[0], x.shape[-1])
                grads["weight1"] = product(multiply, grad_preactivation.t(), rows)
        return *grads.values(), None, grad.to(ctx.residual_dtype) if needs_residual else None


def _check_operands(x: Tensor, weight1: Tensor, weight2: Tensor) -> None:
    check_dtype("x", x, FLOATS)
    check_dtype("weight1", weight1, (x.dtype,))
    check_dtype("weight2", weight2, (x.dtype,))
    fit = x.dim() > 0 and weight1.dim() == weight2.dim() == 2
    if not fit or x.shape[-1] != weight1.shape[1] or weight2.shape[1] != weight1.shape[0]:
        shapes = f"{tuple(x.shape)}, weight1 {tuple(weight1.shape)} and weight2 {tuple(weight2.shape)}"
        raise ValueError(f"x must be [..., M, K], weight1 [H, K] and weight2 [N, H]; x has shape {shapes}")
    check_same_device(x=x, weight1=weight1, weight2=weight2)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight1.t() + bias1) @ weight2.t() + bias2 + residual``, each sum in FP32 and rounded once.

    The values are those of two calls of ``mixft.ops.matmul``. The backward multiplies the gradient of the activation by
    its slope inside the product that makes it, in FP32, and takes the gradient of ``bias1`` from the same pass, also in
    FP32. Differentiable once in every tensor, but as often as torch's layers under the transforms of ``torch.func``.

    Args:
        x: [..., M, K], FP16, BF16 or FP32.
        weight1: [H, K], the dtype of ``x``.
        bias1: [H], the dtype of ``x`` or FP32, or None.
        weight2: [N, H], the dtype of ``x``.
        bias2: [N], the dtype of ``x`` or FP32, or None.
        activation: ``"relu"``, ``"gelu"`` (the erf form), ``"gelu_tanh"`` or ``"silu"``.
        residual: [..., M, N], the dtype of ``x`` or FP32.

    Returns:
        [..., M, N] in the dtype of ``x``, in FP32 where ``residual`` is, contiguous.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, or an unknown activation.
        TypeError: a dtype that is not supported, or weights of another dtype than ``x``.
    """
    name = check_activation(activation)
    if name == "none":
        raise ValueError("activation is None; without one the two layers are one product, or two calls of matmul")
    _check_operands(x, weight1, weight2)
    check_added("bias1", bias1, (weight1.shape[0],), x)
    check_added("bias2", bias2, (weight2.shape[0],), x)
    check_added("residual", residual, (*x.shape[:-1], weight2.shape[0]), x)
    tensors = (x, weight1, bias1, weight2, bias2)
    if is_transformed(*tensors, residual):
        hidden = matmul(x, weight1.t(), bias1, name)
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        return matmul(hidden, weight2.t(), bias2, None, out_dtype, residual=residual)
    if not wants_gradient(*tensors, residual):
        return layers(*tensors, name, residual, False)[2]
    return FusedMLP.apply(*tensors, name, residual)
