"""A sum over K split among programs, and its parts added up: what the passes of every split product share.

    parts[s] = sum of range s of K        total = parts[0] + parts[1] + ...

The order is fixed, so a result is the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def empty_parts(
    shape: tuple[int, int, int], BLOCK_K: int, splits: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, int]:
    """Where the programs store their parts [splits or fewer, M, N], and the values of K in each: whole blocks."""
    M, N, K = shape
    depth = triton.cdiv(triton.cdiv(K, BLOCK_K), splits) * BLOCK_K
    return torch.empty((triton.cdiv(K, depth), M, N), dtype=dtype, device=device), depth


@triton.jit
def sum_of_parts(parts, splits, at, mask, M, N):
    """The tile of the sum at the offsets ``at`` of a part [M, N], of the dtype of ``parts``."""
    pointers = parts + at
    step = tl.cast(M, tl.int64) * N
    total = tl.zeros(at.shape, dtype=parts.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(pointers, mask=mask, other=0)
        pointers += step
    return total
