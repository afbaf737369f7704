"""The gradient of a layer's input through its frozen int8 weight, in one product of bytes.

    out = s * (Q(g w_scale) w) + left right        with g w_scale = s Q(g w_scale), a scale s a row; see ``quantize``

g FP16, BF16 or FP32 [M, N], w int8 [N, K], w_scale FP32 [N, 1], left [M, R] and right [R, K] of the dtype of g or
neither, out [M, K] of the dtype of g. The weight's scale runs along the sum, so it goes into g before that is
quantized. Two launches: the quantizer of rows, which reads g once, and the product of ``int8_matmul``; and torch's
product that is added, if there is one.
"""

from torch import Tensor

from .int8_matmul import int8_matmul
from .quantize import quantize


def int8_input_gradient(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """Launch them. A row of ``grad`` with a NaN or Inf gives a row that is not finite."""
    values, scale, _ = quantize(grad.unsqueeze(-1), True, None, weight_scale.contiguous().view(-1), True)
    one = scale.new_ones(1, 1).expand(weight.shape[1], 1)
    out = int8_matmul(values.view(grad.shape), weight.t(), scale.view(-1, 1), one, None, "none", grad.dtype)
    return out if left is None else out.addmm_(left, right)
