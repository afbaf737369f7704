"""A product whose sum over K is split: the parts by :mod:`.matmul_tiles`, then their sum and the epilogue.

    out[i, j] = epilogue(parts[0, i, j] + parts[1, i, j] + ...)

``parts`` [splits, M, N] are FP32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import matmul_tiles
from .architecture import Architecture
from .matmul_epilogue import Product, apply_epilogue, epilogue_constants
from .matmul_tiles import MatmulConfig
from .split_k import empty_parts, sum_of_parts
from .variant import BYTES, Elementwise, Variant

# Blocks of K that a program multiplies at the least: fewer do not pay for storing and reading its part.
LEAST_BLOCKS = 4
BLOCK_M = 8
BLOCK_N = 128
WARPS = 4


@triton.jit(do_not_specialize=["M", "splits"])
def add_parts_kernel(
    parts, bias, residual, preactivation, kept, out, column_partials,
    M, N, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    apply_epilogue(
        sum_of_parts(parts, splits, at, mask, M, N), bias, residual, preactivation, kept, out, column_partials,
        at, mask, tl.program_id(0), rows, columns, M, N, ACTIVATION,
    )  # fmt: skip


def split_count(product: Product, config: MatmulConfig, multiprocessors: int) -> int:
    """Into how many parts the sum over K is split: as many as give no multiprocessor a second program."""
    M, N, K = product.shape
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    return max(1, min(multiprocessors // tiles, K // (LEAST_BLOCKS * config.BLOCK_K)))


def launch(product: Product, config: MatmulConfig, splits: int) -> Tensor | None:
    """Compute ``product``; returns the partial sums of its columns, None unless asked for."""
    M, N, _ = product.shape
    parts, depth = empty_parts(product.shape, config.BLOCK_K, splits, torch.float32, product.a.device)
    matmul_tiles.launch(Product(product.a, product.b, product.out), config, parts, depth)
    partials = product.column_partials(BLOCK_M)
    with torch.cuda.device_of(product.a):
        add_parts_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
            parts, product.bias, product.residual, product.preactivation, product.kept, product.out, partials,
            M, N, parts.shape[0],
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, ACTIVATION=product.activation,
            num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return partials


def variants(arch: Architecture) -> list[Variant]:
    """The second pass with each kind of epilogue; the first is a variant of :mod:`.matmul_tiles`."""
    if not arch.tensor_cores:
        return []
    return [
        _variant("fp16", "none", bias=True),
        _variant("bf16", "gelu+keep+add", bias=True),
        _variant("fp16", "slope", bias=False),
    ]


def _variant(dtype: str, epilogue: str, *, bias: bool) -> Variant:
    constants = epilogue_constants(epilogue, bias=bias)
    pointers = {"parts": "fp32", **dict.fromkeys(("bias", "residual", "preactivation", "kept", "out"), dtype)}
    pointers |= {"column_partials": "fp32"}
    signature = {name: f"*{kind}" for name, kind in pointers.items() if name not in constants}
    return Variant(
        name=f"add_parts[{dtype},{epilogue}]",
        function=add_parts_kernel,
        signature={**signature, "M": "i32", "N": "i32", "splits": "i32"},
        constexprs={"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, **constants},
        divisible_by_16=(*signature, "N"),
        num_warps=WARPS,
        # One iteration of its loop reads one part.
        work=Elementwise(BLOCK_M * BLOCK_N, BYTES["fp32"]),
    )
