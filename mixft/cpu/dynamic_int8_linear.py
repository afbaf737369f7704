"""CPU routine of the layer with frozen int8 weights whose input is quantized in every call.

The compiled layer serves where it can, else oneDNN's product with a weight that is packed at its first call, and
without VNNI the bare integer product.
"""

from torch import Tensor

from .activation import ACTIVATIONS
from .int8_layer import int8_layer, serves
from .int8_matmul import int8_matmul
from .packed_weight import packed_product, packed_weight
from .quantize import quantize
from .unsigned_rows import unsigned_rows

# oneDNN takes 20 us to start a packed product; one row times a weight of this size takes no longer without it.
SMALL_WEIGHT = 1 << 20


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """``mixft.kernels.dynamic_int8_linear.dynamic_int8_linear`` on the CPU."""
    if x.numel() and weight.numel() and serves(x.shape[0]):
        added = {} if left is None else {"left": left.float().contiguous(), "right": right.float().contiguous()}
        return int8_layer(x, weight, weight_scale, bias, activation, **added)
    if left is not None:
        out = dynamic_int8_linear(x.float(), weight, weight_scale, bias, "none")
        return ACTIVATIONS[activation](out.addmm_(left.float(), right.float())).to(x.dtype)
    packed = None
    if x.shape[0] > 1 or weight.numel() > SMALL_WEIGHT:
        packed = packed_weight(weight) if x.numel() else None
    if packed is None:
        values, scale, _ = quantize(x.unsqueeze(-1), True, None, None, True)
        return int8_matmul(values.view(x.shape), weight, scale.view(-1, 1), weight_scale, bias, activation, x.dtype)
    values, scale = unsigned_rows(x)
    out = packed_product(values, packed, weight_scale, exact=False).mul_(scale)
    if bias is not None:
        out.add_(bias)
    return ACTIVATIONS[activation](out).to(x.dtype)
