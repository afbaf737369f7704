"""A gradient as the two int8 operands of a layer's backward, and its column sums, from one sweep and another.

    rows      S[m] = max_n |g c| / 127    Q[m, n] = round(g[m, n] c[n] / S[m])        the gradient of the input
    columns   T[n] = max_m |g r| / 127    P[n, m] = round(g[m, n] r[m] / T[n])        the gradient of the weight
    bias      b[n] = sum_m g[m, n]

``g`` is [M, N], FP16, BF16 or FP32; the factors ``r`` [M] and ``c`` [N] are the scales of the operands that share the
summed dimension. Bounds of the scales, and rounding, are those of ``quantize.py``; a row or column with a NaN or
infinity gets a scale that is not finite. P is transposed: a product sums along its rows, as int8 matrix instructions
read their operands, where four operations apart would read ``g`` four times and leave P across.

The first launch reads tiles of ``g`` and leaves the largest magnitudes, whose bits are ordered as integers and so need
no more than an atomic maximum, the same in any order; the second one rounds each tile both ways.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .int8_rounding import SMALLEST_SCALE, round_to_int8, scale_of
from .variant import Elementwise, Variant, elementwise_variant


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of a program's tile, and its warps."""

    rows: int
    columns: int
    num_warps: int


CONFIG = TileConfig(rows=64, columns=64, num_warps=4)


@triton.jit
def load_gradient(g_ptr, row_factor_ptr, column_factor_ptr, m, n, M, N, stride):
    """The tile of rows ``m`` and columns ``n``, it times the columns' factors and it times the rows', FP32."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    g = tl.load(g_ptr + m[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    by_row = g * tl.load(column_factor_ptr + n, mask=n < N, other=0.0)[None, :]
    by_column = g * tl.load(row_factor_ptr + m, mask=m < M, other=0.0)[:, None]
    return g, by_row, by_column


@triton.jit
def saturated_magnitude_bits(x):
    """Bits of |x|, in order as integers; those of infinity for a NaN too."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["blocks_n"])
def gradient_ranges_kernel(
    g_ptr, row_factor_ptr, column_factor_ptr, row_high_ptr, column_high_ptr, sums_ptr,
    M, N, stride, blocks_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) // blocks_n).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g, by_row, by_column = load_gradient(g_ptr, row_factor_ptr, column_factor_ptr, m, n, M, N, stride)
    tl.atomic_max(row_high_ptr + m, tl.max(saturated_magnitude_bits(by_row), axis=1), mask=m < M, sem="relaxed")
    tl.atomic_max(column_high_ptr + n, tl.max(saturated_magnitude_bits(by_column), axis=0), mask=n < N, sem="relaxed")
    tl.store(sums_ptr + block * N + n, tl.sum(g, axis=0), mask=n < N)


@triton.jit(do_not_specialize=["blocks_n"])
def round_gradient_kernel(
    g_ptr, row_factor_ptr, column_factor_ptr, row_high_ptr, column_high_ptr,
    values_ptr, scale_ptr, transposed_ptr, column_scale_ptr, seed_ptr, column_seed_ptr,
    M, N, stride, blocks_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_m = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) % blocks_n).to(tl.int64) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    _, by_row, by_column = load_gradient(g_ptr, row_factor_ptr, column_factor_ptr, m, n, M, N, stride)

    high = tl.load(row_high_ptr + m, mask=m < M, other=0).to(tl.float32, bitcast=True)
    scale, inverse, zero_point = scale_of(-high, high, True)
    tl.store(scale_ptr + m, scale, mask=(m < M) & (first_n == 0))
    values = round_to_int8(by_row, inverse, zero_point, seed_ptr, m, first_n, True, BLOCK_N)
    tl.store(values_ptr + m[:, None] * N + n[None, :], values, mask=(m < M)[:, None] & (n < N)[None, :])

    high = tl.load(column_high_ptr + n, mask=n < N, other=0).to(tl.float32, bitcast=True)
    scale, inverse, zero_point = scale_of(-high, high, True)
    tl.store(column_scale_ptr + n, scale, mask=(n < N) & (first_m == 0))
    values = round_to_int8(tl.trans(by_column), inverse, zero_point, column_seed_ptr, n, first_m, True, BLOCK_M)
    tl.store(transposed_ptr + n[:, None] * M + m[None, :], values, mask=(n < N)[:, None] & (m < M)[None, :])


def quantize_gradient(
    grad: Tensor, row_factor: Tensor, column_factor: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize ``grad`` [M, N] by rows and by columns.

    Args:
        grad: FP16, BF16 or FP32, any strides.
        row_factor: FP32 [M], contiguous, which multiplies each column before its range is taken.
        column_factor: FP32 [N], contiguous, which multiplies each row.
        seed: int64 scalar tensor for stochastic rounding, of the columns with its lowest bit changed; None rounds to
            the nearest.

    Returns:
        int8 [M, N] and FP32 scales [M, 1] of the rows, int8 [N, M], contiguous, and scales [N, 1] of the columns, and
        the FP32 column sums [N], added in the same order in every call.
    """
    M, N = grad.shape
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    blocks_m, blocks_n = triton.cdiv(M, CONFIG.rows), triton.cdiv(N, CONFIG.columns)
    highs = torch.zeros(M + N, dtype=torch.int32, device=grad.device)
    sums = torch.empty((blocks_m, N), dtype=torch.float32, device=grad.device)
    values = torch.empty((M, N), dtype=torch.int8, device=grad.device)
    transposed = torch.empty((N, M), dtype=torch.int8, device=grad.device)
    scale = torch.empty((M, 1), dtype=torch.float32, device=grad.device)
    column_scale = torch.empty((N, 1), dtype=torch.float32, device=grad.device)
    if grad.numel() == 0:
        smallest = SMALLEST_SCALE.value
        return values, scale.fill_(smallest), transposed, column_scale.fill_(smallest), sums.sum(0)
    column_seed = None if seed is None else seed ^ 1
    row_high, column_high = highs[:M], highs[M:]
    constants = {"BLOCK_M": CONFIG.rows, "BLOCK_N": CONFIG.columns, "num_warps": CONFIG.num_warps, "num_stages": 1}
    with torch.cuda.device_of(grad):
        gradient_ranges_kernel[(blocks_m * blocks_n,)](
            grad, row_factor, column_factor, row_high, column_high, sums, M, N, grad.stride(0), blocks_n, **constants
        )
        round_gradient_kernel[(blocks_m * blocks_n,)](
            grad, row_factor, column_factor, row_high, column_high, values, scale, transposed, column_scale,
            seed, column_seed, M, N, grad.stride(0), blocks_n, **constants,
        )  # fmt: skip
    return values, scale, transposed, column_scale, sums.sum(0)


def variants(arch: Architecture) -> list[Variant]:
    """Both launches, of a 16-bit gradient rounded to the nearest and of an FP32 one rounded at random."""
    types = {
        "row_factor_ptr": "*fp32", "column_factor_ptr": "*fp32", "row_high_ptr": "*i32", "column_high_ptr": "*i32",
        "sums_ptr": "*fp32", "values_ptr": "*i8", "scale_ptr": "*fp32", "transposed_ptr": "*i8",
        "column_scale_ptr": "*fp32", "seed_ptr": "*i64", "column_seed_ptr": "*i64",
    }  # fmt: skip
    found = []
    for name, dtype, stochastic in (("bf16", "bf16", False), ("fp32,stochastic", "fp32", True)):
        for function, written in ((gradient_ranges_kernel, 0), (round_gradient_kernel, 2)):
            constants = {"BLOCK_M": CONFIG.rows, "BLOCK_N": CONFIG.columns}
            if not stochastic:
                constants |= {"seed_ptr": None, "column_seed_ptr": None}
            known = types | {"g_ptr": f"*{dtype}"}
            work = Elementwise(CONFIG.rows * CONFIG.columns, (2 if dtype == "bf16" else 4) + written)
            found.append(
                elementwise_variant(
                    function, name, known, constants, ("blocks_n",), num_warps=CONFIG.num_warps, work=work
                )
            )
    return found
