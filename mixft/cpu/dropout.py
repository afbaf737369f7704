"""Dropout on the CPU whose mask follows from a seed, so that the backward makes it again instead of keeping it."""

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

LANES = 2**16

compiled = native.Routine("dropout", *[c_void_p] * 2, c_int64, *[c_int] * 2, c_float, c_int64)


def dropout(x: Tensor, dropped: int, seed: int) -> Tensor:
    """``x`` with elements zeroed at probability ``dropped / 2^16``, the others divided by that of being kept.

    Args:
        x: FP16, BF16 or FP32, contiguous.
        dropped: from 1 to 2^16 - 1.
        seed: int64, from which the elements that are dropped follow; they depend on whether there are compiled
            routines, but not on the number of threads.
    """
    scale = LANES / (LANES - dropped)
    if native.available():
        out = torch.empty_like(x)
        compiled(native.address(x), out.data_ptr(), x.numel(), native.DTYPES[x.dtype], dropped, scale, seed)
        return out
    # One 64-bit random number for four elements.
    generator = torch.Generator("cpu").manual_seed(seed)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu")
    bits.random_(-(2**63), None, generator=generator)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LANES // 2
    return x * kept.to(x.dtype).mul_(scale)
