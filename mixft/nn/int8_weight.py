"""The modes of ``QuantLinear`` that keep an int8 weight: what such a layer holds and computes."""

import torch
from torch import Tensor

from mixft.ops import dynamic_int8_linear, quantize, weight_only_matmul
from mixft.ops.activation import activate

SERVE = {"dynamic": dynamic_int8_linear, "weight_only": weight_only_matmul}


def int8_weight_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as int8 [N, K] and one symmetric FP32 scale a row [N, 1].

    Raises:
        ValueError: it holds NaN or Inf.
    """
    with torch.no_grad():
        values, scale, _ = quantize(weight, nonfinite="error")
    return values, scale


def forward(
    mode: str, input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The layer's output; an activation is fused unless a gradient may have to go through it."""
    serve = SERVE[mode]
    if activation is None or not torch.is_grad_enabled():
        return serve(input, weight, weight_scale, bias, activation)
    return activate(serve(input, weight, weight_scale, bias), activation)
