"""The modes of ``QuantLinear`` that keep an int8 weight: what such a layer holds and computes."""

import torch
from torch import Tensor, nn

from mixft.ops import (
    dynamic_int8_linear,
    outlier_int8_linear,
    quantize,
    static_int8_linear,
    weight_only_matmul,
)
from mixft.ops.activation import activate

# Buffers that no cast changes: a scale in 16 bits would change the weights or the input.
SCALES = ("weight_scale", "input_scale")
BUFFERS = (*SCALES, "weight", "input_zero_point", "weight_sum")


def int8_weight_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as int8 [N, K] and one symmetric FP32 scale a row [N, 1].

    Raises:
        ValueError: it holds NaN or Inf.
    """
    with torch.no_grad():
        values, scale, _ = quantize(weight, nonfinite="error")
    return values, scale


def register_input_range(layer: nn.Module, scale: Tensor, zero_point: Tensor, weight_sum: Tensor) -> None:
    """Give ``layer`` the buffers of the static mode: scale and zero point of its input, and the sums of its weight."""
    layer.register_buffer("input_scale", scale)
    layer.register_buffer("input_zero_point", zero_point)
    layer.register_buffer("weight_sum", weight_sum)


def forward(layer: nn.Module, input: Tensor) -> Tensor:
    """The layer's output; an activation is fused unless a gradient may have to go through it."""
    layer.guard.starts_forward(input)
    operands = input, layer.weight, layer.weight_scale, layer.bias
    backward = layer.backward
    fused = layer.activation is None or not torch.is_grad_enabled()
    activation = layer.activation if fused else None
    if layer.outlier_threshold is not None:
        out, fused = outlier_int8_linear(*operands, threshold=layer.outlier_threshold, backward=backward), False
    elif layer.mode == "static":
        out = static_int8_linear(
            *operands,
            activation,
            backward=backward,
            input_scale=layer.input_scale,
            input_zero_point=layer.input_zero_point,
            weight_sum=layer.weight_sum,
        )
    else:
        serve = dynamic_int8_linear if layer.mode == "dynamic" else weight_only_matmul
        out = serve(*operands, activation, backward=backward)
    layer.watch_gradient(out)
    return out if fused else activate(out, layer.activation)
