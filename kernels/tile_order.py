"""Which output tile of a matrix product a program computes."""

import triton
import triton.language as tl


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile (row, column) at ``index``: the order walks GROUP_M rows of tiles at a time, so that neighbours share
    their columns of b in the L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = (index // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = index % per_group
    return first_m + within % rows, within // rows


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """:func:`tile_at` of a program that computes one tile."""
    return tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
