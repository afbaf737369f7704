"""CPU routine of the gradient through a frozen int8 weight: compiled where it can be, else quantizer and product."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .int8_layer import low_rank, room_for, serves
from .int8_matmul import int8_matmul
from .quantize import quantize

compiled = native.Routine(
    "int8_input_gradient",
    *(c_void_p, c_int, c_int64, c_int64, c_int64),
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
    *(c_void_p, c_void_p, c_void_p),
)


def int8_input_gradient(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``mixft.kernels.int8_input_gradient.int8_input_gradient`` on the CPU."""
    left, right = (None if factor is None else factor.float().contiguous() for factor in (left, right))
    if not (grad.numel() and weight.numel() and serves(grad.shape[0])):
        values, scale, _ = quantize(grad.unsqueeze(-1), True, None, weight_scale.contiguous().view(-1), True)
        one = scale.new_ones(1, 1).expand(weight.shape[1], 1)
        out = int8_matmul(values.view(grad.shape), weight.t(), scale.view(-1, 1), one, None, "none", torch.float32)
        return (out if left is None else out.addmm_(left, right)).to(grad.dtype)
    grad, weight, weight_scale = grad.contiguous(), weight.contiguous(), weight_scale.contiguous()
    (M, N), K = grad.shape, weight.shape[1]
    out = torch.empty((M, K), dtype=grad.dtype, device="cpu")
    room = room_for(M, N)
    compiled(
        *(*native.typed(grad), M, N, K),
        *(native.address(weight), native.address(weight_scale), *low_rank(left, right)),
        *(out.data_ptr(), *room[1:]),
    )
    return out
