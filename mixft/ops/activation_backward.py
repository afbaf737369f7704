"""``activation_backward``: the slope of an activation times the gradient, and the bias gradient, in one pass."""

from functools import partial

import torch
from torch import Tensor

from mixft.cpu import activation_backward as cpu

from .registration import define_op, needs_dispatch


@define_op("activation_backward")
def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    columns = grad.shape[1] if want_bias else 0
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty((columns,), dtype=torch.float32)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


# Of a gradient and the pre-activation, differentiable.
SLOPES = {
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
    "gelu": partial(torch.ops.aten.gelu_backward, approximate="none"),
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": _silu_backward,
}


def differentiable_activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """What ``activation_backward`` gives, by torch's operators, for a derivative of it."""
    product = SLOPES[activation](grad.float(), kept.float().reshape(grad.shape))
    return product.to(dtype), product.sum(0) if want_bias else None


def column_sums(grad: Tensor) -> Tensor:
    """FP32 [N]: the sum over the rows of ``grad`` [M, N], the gradient of a bias that was added to them."""
    if grad.device.type != "cpu" or torch.is_grad_enabled() or needs_dispatch(grad):
        return grad.sum(0, dtype=torch.float32)
    return cpu.column_sums(grad)
