"""The second pass of a product whose sum over K was split: the parts added in order, then the epilogue.

    out[i, j] = epilogue(parts[0, i, j] + parts[1, i, j] + ...)

The order is fixed, so a result is the same on every run.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import matmul_tiles
from .architecture import Architecture
from .matmul_epilogue import Product, apply_epilogue, epilogue_constants
from .matmul_tiles import MatmulConfig
from .variant import BYTES, Elementwise, Variant

# Blocks of K that a program multiplies at the least: fewer do not pay for storing and reading its part.
LEAST_BLOCKS = 4


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
    pointers = parts + at
    step = tl.cast(M, tl.int64) * N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += step
    apply_epilogue(
        total, bias, residual, preactivation, kept, out, column_partials,
        at, mask, tl.program_id(0), rows, columns, M, N, ACTIVATION,
    )  # fmt: skip


@dataclass(frozen=True)
class AddPartsConfig:
    """Tile sizes and warps of the second pass."""

    BLOCK_M: int = 8
    BLOCK_N: int = 128
    num_warps: int = 4


def split_count(product: Product, config: MatmulConfig, multiprocessors: int) -> int:
    """Into how many parts the sum over K is split: one where at least half the multiprocessors have a tile as it is."""
    M, N, K = product.shape
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    if 2 * tiles > multiprocessors:
        return 1
    return max(1, min(multiprocessors // tiles, K // (LEAST_BLOCKS * config.BLOCK_K)))


def launch(product: Product, config: MatmulConfig, splits: int) -> Tensor | None:
    """Compute ``product``; returns the partial sums of its columns, None unless asked for."""
    M, N, K = product.shape
    depth = triton.cdiv(triton.cdiv(K, config.BLOCK_K), splits) * config.BLOCK_K
    parts = torch.empty((triton.cdiv(K, depth), M, N), dtype=torch.float32, device=product.a.device)
    matmul_tiles.launch(Product(product.a, product.b, product.out), config, parts, depth)
    second = AddPartsConfig()
    partials = product.column_partials(second.BLOCK_M)
    with torch.cuda.device_of(product.a):
        add_parts_kernel[(triton.cdiv(M, second.BLOCK_M), triton.cdiv(N, second.BLOCK_N))](
            parts, product.bias, product.residual, product.preactivation, product.kept, product.out, partials,
            M, N, parts.shape[0],
            ACTIVATION=product.activation,
            **asdict(second), num_stages=1,
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
    config, constants = AddPartsConfig(), epilogue_constants(epilogue, bias=bias)
    pointers = {"parts": "fp32", **dict.fromkeys(("bias", "residual", "preactivation", "kept", "out"), dtype)}
    pointers |= {"column_partials": "fp32"}
    signature = {name: f"*{kind}" for name, kind in pointers.items() if name not in constants}
    return Variant(
        name=f"add_parts[{dtype},{epilogue}]",
        function=add_parts_kernel,
        signature={**signature, "M": "i32", "N": "i32", "splits": "i32"},
        constexprs={"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, **constants},
        divisible_by_16=(*signature, "N"),
        num_warps=config.num_warps,
        # One iteration of its loop reads one part.
        work=Elementwise(config.BLOCK_M * config.BLOCK_N, BYTES["fp32"]),
    )
