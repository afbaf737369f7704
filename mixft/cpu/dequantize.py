"""The inverse of int8 quantization on the CPU."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

compiled = native.Routine("dequantize", *[c_void_p] * 4, c_int, *[c_int64] * 3)


def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(values - zero_point) scale as ``dtype``, contiguous; see ``mixft.kernels.dequantize.dequantize``."""
    if native.available() and values.numel():
        values = values.contiguous()
        out = torch.empty(values.shape, dtype=dtype, device="cpu")
        compiled(*map(native.address, (values, scale, zero_point)), *native.typed(out), *values.shape)
        return out
    y = values.to(torch.float32, memory_format=torch.contiguous_format)
    if zero_point is not None:
        y.sub_(zero_point)
    return y.mul_(scale).to(dtype)
