"""The ``train`` mode of ``QuantLinear``: a floating-point weight whose products run in int8."""

from torch import Tensor

from mixft.ops import int8_linear
from mixft.ops.activation import activate


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The layer's output, differentiable in input, weight and bias."""
    return activate(int8_linear(input, weight, bias), activation)
