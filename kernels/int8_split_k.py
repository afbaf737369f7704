"""The second pass of a product with int8 weights whose sum over K was split: the parts added up, then the epilogue.

    out[m, n] = epilogue(parts[0, m, n] + parts[1, m, n] + ...)

``parts`` [splits, M, N] are int32 or FP32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .int8_epilogue import STRIDES, Epilogue, apply_int8_epilogue, epilogue_signature
from .split_k import sum_of_parts
from .variant import Elementwise, Variant

# Blocks of K that a program multiplies at the least: fewer do not pay for storing and reading its part.
LEAST_BLOCKS = 2
BLOCK_M = 4
BLOCK_N = 256
WARPS = 4


@triton.jit(do_not_specialize=["M", "splits"])
def add_scaled_parts_kernel(
    parts_ptr,
    a_scale_ptr, b_scale_ptr, a_zero_point_ptr, b_sum_ptr, bias_ptr, out_ptr,
    M, N, splits,
    a_scale_stride, b_scale_stride, a_zero_point_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows[:, None] * N + columns[None, :]
    apply_int8_epilogue(
        sum_of_parts(parts_ptr, splits, at, mask, M, N), rows, columns, M, N,
        a_scale_ptr, b_scale_ptr, a_zero_point_ptr, b_sum_ptr, bias_ptr, out_ptr,
        a_scale_stride, b_scale_stride, a_zero_point_stride, ACTIVATION,
    )  # fmt: skip


def split_count(tiles: int, blocks: int, multiprocessors: int) -> int:
    """Into how many parts a sum of ``blocks`` blocks is split: as many as give each multiprocessor a program."""
    return max(1, min(triton.cdiv(multiprocessors, tiles), blocks // LEAST_BLOCKS))


def add_parts(parts: Tensor, epilogue: Epilogue) -> None:
    """Fill ``epilogue.out`` [M, N] from ``parts`` [splits, M, N], contiguous."""
    splits, M, N = parts.shape
    with torch.cuda.device_of(parts):
        add_scaled_parts_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
            parts_ptr=parts,
            M=M,
            N=N,
            splits=splits,
            **epilogue.arguments(),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=WARPS,
            num_stages=1,
        )


def variants(arch: Architecture) -> list[Variant]:
    """The second pass for int32 parts with every epilogue, and for FP32 parts; the first is one of ``int8_matmul``."""
    if not arch.tensor_cores:
        return []
    return [_variant("i32", "fp16", "gelu", w8a8=True), _variant("fp32", "bf16", "none", w8a8=False)]


def _variant(parts: str, out: str, activation: str, *, w8a8: bool) -> Variant:
    signature, lacking = epilogue_signature(out, a_scale=w8a8, affine=w8a8, bias=True)
    signature = {"parts_ptr": f"*{parts}", **signature, "M": "i32", "N": "i32", "splits": "i32"}
    divisible = [name for name in signature if name not in ("M", "splits", *STRIDES)]
    return Variant(
        name=f"add_scaled_parts[{parts},{activation}]",
        function=add_scaled_parts_kernel,
        signature=signature,
        constexprs={**lacking, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "ACTIVATION": activation},
        divisible_by_16=tuple(divisible),
        num_warps=WARPS,
        # One iteration of its loop reads one part.
        work=Elementwise(BLOCK_M * BLOCK_N, 4),
    )
