"""``activation_backward``: the slope of an activation times the gradient, and the bias gradient, in one pass."""

import torch
from torch import Tensor

from .registration import define_op


@define_op("activation_backward")
def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    columns = grad.shape[1] if want_bias else 0
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty((columns,), dtype=torch.float32)
