"""Calls of ops with a frozen int8 weight, differentiable in the input and the bias as if the input were not rounded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import check_activation
from .int8_input_gradient import check_frozen_backward, input_gradient
from .registration import is_traced, map_over_rows, take_rows_together, without_dispatch


def _keep(ctx, backward: str, inputs: tuple) -> None:
    x, weight, weight_scale, bias = inputs[:4]
    ctx.products, ctx.others = backward, len(inputs) - 4
    ctx.save_for_backward(weight, weight_scale)
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype


def _gradients(ctx, grad_out: Tensor, needs_x: bool, needs_bias: bool) -> tuple[Tensor | None, ...]:
    x_dtype, bias_dtype = ctx.dtypes
    grad_x = input_gradient(grad_out, *ctx.saved_tensors, ctx.products).to(x_dtype) if needs_x else None
    grad_bias = grad_out.sum(0, dtype=torch.float32).to(bias_dtype) if needs_bias else None
    return grad_x, None, None, grad_bias, *[None] * ctx.others


class FrozenWeight(torch.autograd.Function):
    """``serve(x, weight, weight_scale, bias, *others)`` whose backward runs in ``backward``'s products."""

    @staticmethod
    def forward(serve, backward, *inputs):
        return serve(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs[1], inputs[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        return None, None, *_gradients(ctx, grad_out, ctx.needs_input_grad[2], ctx.needs_input_grad[5])

    @staticmethod
    def vmap(info, in_dims, serve, backward, *inputs):
        return map_over_rows(partial(FrozenWeight.apply, serve, backward), info, in_dims[2:], *inputs)


def register_gradient(op, backward: str) -> None:
    """Give ``op`` of (x, weight, weight_scale, bias, ...) a gradient of its own, for exported programs, and vmap."""
    take_rows_together(op)

    def differentiate(ctx, grad_out: Tensor):
        return _gradients(ctx, grad_out, ctx.needs_input_grad[0], ctx.needs_input_grad[3])

    op.register_autograd(differentiate, setup_context=lambda ctx, inputs, output: _keep(ctx, backward, inputs))


def call_frozen(
    op: Callable,
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *more: Any,
    backward: str,
) -> Tensor:
    """Call an op of a layer with a frozen int8 weight on ``rows``, those of ``x`` [..., K]; its result as [..., N].

    Args:
        op: of (rows, weight, weight_scale, bias, activation, *more).
        backward: what the gradient of ``x`` is computed in; see :func:`.int8_input_gradient.input_gradient`.

    Raises:
        ValueError: an unknown activation or ``backward``, or an activation while a gradient is wanted: what came
            before it is not kept.
    """
    check_frozen_backward(backward)
    operands = rows, weight, weight_scale, bias, check_activation(activation), *more
    serve = without_dispatch(op, x, weight, weight_scale, bias)
    wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wanted:
        refuse_activation_gradient(activation)
    if wanted and not is_traced():
        out = FrozenWeight.apply(serve, backward, *operands)
    else:
        out = serve(*operands)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def refuse_activation_gradient(activation: str | None) -> None:
    """Raise ValueError for an ``activation`` whose gradient is wanted."""
    if activation not in (None, "none"):
        raise ValueError(
            f"activation={activation!r} cannot be differentiated here; apply the activation to the result, or call "
            "under torch.no_grad()"
        )
