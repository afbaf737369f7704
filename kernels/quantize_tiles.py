"""The tiles in which ``quantize`` and ``dequantize`` walk a 3-D view, and their sizes."""

from dataclasses import dataclass

import triton
from torch import Tensor

from .architecture import Architecture


@dataclass(frozen=True)
class QuantizeConfig:
    """Sizes of the tiles that one program works on.

    Attributes:
        elements: elements of a tile, when nothing asks for more.
        resident: largest tile that is held in registers between finding the range and rounding.
        columns: groups a tile where neighbouring groups, not neighbours in a group, are adjacent in memory.
        elements_per_thread: elements of a tile that each thread holds.
        programs: programs that a two-launch call aims for.
    """

    elements: int
    resident: int
    columns: int
    elements_per_thread: int
    programs: int


def batch_n_kept(tensor: Tensor, inner: int) -> Tensor:
    """[outer, n, inner] as [batch, n, kept]: with one inner element it is the outer dimension that tiles run along."""
    return tensor if inner > 1 else tensor.transpose(0, 2)


def strides(tensor: Tensor) -> list[int]:
    """Strides of [batch, n, kept], 0 where there is one batch or one kept.

    torch's own stride of such a dimension is often 1, which 16 does not divide: for an offset that might be odd the
    compiler would make every access scalar.
    """
    return [0 if i != 1 and size == 1 else tensor.stride(i) for i, size in enumerate(tensor.shape)]


def tile(x: Tensor, config: QuantizeConfig) -> tuple[int, int, bool]:
    """(BLOCK_KEPT, BLOCK_N, resident) for ``x`` as [batch, n, kept]."""
    _, n, kept = x.shape
    block_n = max(8, triton.next_power_of_2(n))
    widest = triton.next_power_of_2(kept)
    narrowest = min(config.columns if x.stride(2) == 1 and x.stride(1) != 1 else 1, widest)
    if block_n * narrowest <= config.resident:
        return min(max(config.elements // block_n, narrowest), widest), block_n, True
    return narrowest, config.elements // narrowest, False


def warps(block_kept: int, block_n: int, config: QuantizeConfig, arch: Architecture) -> int:
    # With more than 16 warps a thread has 64 registers, and the largest tiles spill.
    return min(max(block_kept * block_n // (config.elements_per_thread * arch.warp_size), 1), 16)
