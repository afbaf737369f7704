"""The layer with frozen int8 weights whose input is quantized in every call.

    out = act(s * w_scale * (Q(x) w^T) + bias + left right)    with x = s Q(x), a scale s a row; see ``quantize``

x FP16, BF16 or FP32 [M, K], w int8 [N, K], w_scale FP32 [N, 1], bias [N], left [M, R] and right [R, N] of the dtype of
x or neither, out [M, N] of the dtype of x. Two launches: the quantizer of rows, which reads x once, and the product of
``int8_matmul``; and torch's product that is added, if there is one.
"""

import torch

from .int8_matmul import int8_matmul
from .quantize import quantize


def dynamic_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch them. A row of ``x`` with a NaN or Inf gives a row that is not finite.

    ``left`` and ``right`` go without an activation.
    """
    values, scale, _ = quantize(x.unsqueeze(-1), True, None, None, True)
    out = int8_matmul(values.view(x.shape), weight, scale.view(-1, 1), weight_scale, bias, activation, x.dtype)
    return out if left is None else out.addmm_(left, right)
