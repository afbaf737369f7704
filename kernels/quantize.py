"""int8 quantization along one dimension of a 3-D view.

    symmetric   S = max|x| / 127                   Z = 0                       Q = round(x / S)      in [-127, 127]
    affine      S = (max(x, 0) - min(x, 0)) / 255  Z = round(-128 - min(x) / S)  Q = round(x / S + Z)  in [-128, 127]

``x`` is [outer, n, inner], any strides, FP16, BF16 or FP32; ``n`` is the dimension reduced. ``Q`` is int8 of x's shape,
``S`` FP32 and ``Z`` int32 of shape [outer, 1, inner]; the outputs are contiguous. All arithmetic is FP32.

- ``factor`` FP32 [n], where given, multiplies x along n first: a scale of another tensor that shares the dimension.
- S is never below 2^-126, the smallest normal FP32 number, so that 1/S is finite and an all-zero group needs no branch.
- The range is taken over finite values; an infinity saturates, NaN becomes the representation of zero.
- Rounding is to the nearest, ties to even, or stochastic: the nearest of x/S + Z + u with u uniform in (-1/2, 1/2).

A group that fits a program's registers is read once. A longer one is read twice, by two launches, each over many
programs: the first leaves one partial range a program, the second reduces those and rounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .configuration import configuration
from .int8_rounding import finite_range, round_to_int8, scale_of
from .quantize_tiles import QuantizeConfig, batch_n_kept, strides, tile, warps
from .variant import BYTES, Elementwise, Variant, elementwise_variant


@triton.jit
def store_scale(scale_ptr, zero_point_ptr, offsets, mask, scale, zero_point, SYMMETRIC: tl.constexpr):
    tl.store(scale_ptr + offsets, scale, mask=mask)
    if not SYMMETRIC:
        tl.store(zero_point_ptr + offsets, zero_point.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["blocks_kept"])
def quantize_resident_kernel(
    x_ptr, factor_ptr, values_ptr, scale_ptr, zero_point_ptr, seed_ptr,
    n, kept, blocks_kept,
    x_stride_batch, x_stride_n, x_stride_kept,
    values_stride_batch, values_stride_n, values_stride_kept,
    SYMMETRIC: tl.constexpr, PROPAGATE: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // blocks_kept).to(tl.int64)
    k = (program % blocks_kept).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    j = tl.arange(0, BLOCK_N)
    mask = (k < kept)[:, None] & (j < n)[None, :]
    group = batch * kept + k

    source = x_ptr + batch * x_stride_batch + k[:, None] * x_stride_kept + j.to(tl.int64)[None, :] * x_stride_n
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + j, mask=j < n, other=0.0)[None, :]
    low, high = finite_range(x, SYMMETRIC, PROPAGATE)
    scale, inverse, zero_point = scale_of(low, high, SYMMETRIC)
    store_scale(scale_ptr, zero_point_ptr, group, k < kept, scale, zero_point, SYMMETRIC)
    values = round_to_int8(x, inverse, zero_point, seed_ptr, group, 0, SYMMETRIC, BLOCK_N)
    target = values_ptr + batch * values_stride_batch + k[:, None] * values_stride_kept
    tl.store(target + j.to(tl.int64)[None, :] * values_stride_n, values, mask=mask)


@triton.jit(do_not_specialize=["blocks_kept", "splits"])
def partial_ranges_kernel(
    x_ptr, factor_ptr, low_ptr, high_ptr,
    n, kept, blocks_kept, splits, span,
    x_stride_batch, x_stride_n, x_stride_kept,
    SYMMETRIC: tl.constexpr, PROPAGATE: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program % splits).to(tl.int64)
    batch = (program // splits // blocks_kept).to(tl.int64)
    k = (program // splits % blocks_kept).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    low = tl.zeros([BLOCK_KEPT], tl.float32)
    high = tl.zeros([BLOCK_KEPT], tl.float32)
    for first in range(0, span, BLOCK_N):
        j = split * span + first + tl.arange(0, BLOCK_N)
        mask = (k < kept)[:, None] & (j < n)[None, :]
        source = x_ptr + batch * x_stride_batch + k[:, None] * x_stride_kept + j[None, :] * x_stride_n
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            x *= tl.load(factor_ptr + j, mask=j < n, other=0.0)[None, :]
        tile_low, tile_high = finite_range(x, SYMMETRIC, PROPAGATE)
        low = tl.minimum(low, tile_low)
        high = tl.maximum(high, tile_high)
    offsets = (batch * splits + split) * kept + k
    tl.store(high_ptr + offsets, high, mask=k < kept)
    if not SYMMETRIC:
        tl.store(low_ptr + offsets, low, mask=k < kept)


@triton.jit(do_not_specialize=["blocks_kept", "splits"])
def quantize_split_kernel(
    x_ptr, factor_ptr, values_ptr, scale_ptr, zero_point_ptr, low_ptr, high_ptr, seed_ptr,
    n, kept, blocks_kept, splits, span,
    x_stride_batch, x_stride_n, x_stride_kept,
    values_stride_batch, values_stride_n, values_stride_kept,
    SYMMETRIC: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program % splits).to(tl.int64)
    batch = (program // splits // blocks_kept).to(tl.int64)
    k = (program // splits % blocks_kept).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    group = batch * kept + k

    s = tl.arange(0, BLOCK_SPLITS)
    partial = (batch * splits + s)[None, :] * kept + k[:, None]
    partial_mask = (k < kept)[:, None] & (s < splits)[None, :]
    high = tl.max(tl.load(high_ptr + partial, mask=partial_mask, other=0.0), axis=1)
    low = -high
    if not SYMMETRIC:
        low = tl.min(tl.load(low_ptr + partial, mask=partial_mask, other=0.0), axis=1)
    scale, inverse, zero_point = scale_of(low, high, SYMMETRIC)
    if split == 0:
        store_scale(scale_ptr, zero_point_ptr, group, k < kept, scale, zero_point, SYMMETRIC)

    for first in range(0, span, BLOCK_N):
        j = split * span + first + tl.arange(0, BLOCK_N)
        mask = (k < kept)[:, None] & (j < n)[None, :]
        source = x_ptr + batch * x_stride_batch + k[:, None] * x_stride_kept + j[None, :] * x_stride_n
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            x *= tl.load(factor_ptr + j, mask=j < n, other=0.0)[None, :]
        values = round_to_int8(x, inverse, zero_point, seed_ptr, group, split * span + first, SYMMETRIC, BLOCK_N)
        target = values_ptr + batch * values_stride_batch + k[:, None] * values_stride_kept
        tl.store(target + j[None, :] * values_stride_n, values, mask=mask)


def quantize(
    x: Tensor, symmetric: bool, seed: Tensor | None, factor: Tensor | None = None, propagate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``x`` [outer, n, inner] along ``n``.

    Args:
        x: FP16, BF16 or FP32, any strides.
        symmetric: the formula, see the module docstring.
        seed: int64 scalar tensor on x's device for stochastic rounding; None rounds to the nearest.
        factor: FP32 [n], contiguous, or None.
        propagate: for symmetric calls, give a group with a NaN or infinity a scale that is not finite, and any values.

    Returns:
        values int8 [outer, n, inner], scale FP32 [outer, 1, inner], zero point int32 [outer, 1, inner], or [0] when
        ``symmetric``.
    """
    outer, n, inner = x.shape
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((outer, 1, inner), dtype=torch.float32, device=x.device)
    zero_point = torch.empty(0 if symmetric else scale.shape, dtype=torch.int32, device=x.device)
    if scale.numel() == 0:
        return values, scale, zero_point
    zero_point_pointer = None if symmetric else zero_point
    arch = architecture_of(x.device)
    config = configuration("quantize", QuantizeConfig, arch, "all")
    source, target = batch_n_kept(x, inner), batch_n_kept(values, inner)
    batch, _, kept = source.shape
    block_kept, block_n, resident = tile(source, config)
    blocks_kept = triton.cdiv(kept, block_kept)
    constants = {
        "SYMMETRIC": symmetric,
        "BLOCK_KEPT": block_kept,
        "BLOCK_N": block_n,
        "num_warps": warps(block_kept, block_n, config, arch),
        "num_stages": 1,
    }
    with torch.cuda.device_of(x):
        if resident:
            quantize_resident_kernel[(batch * blocks_kept,)](
                source, factor, target, scale, zero_point_pointer, seed, n, kept, blocks_kept,
                *strides(source), *strides(target), PROPAGATE=propagate, **constants,
            )  # fmt: skip
            return values, scale, zero_point
        most = 1024 if block_kept == 1 else 64
        splits = min(triton.cdiv(config.programs, batch * blocks_kept), triton.cdiv(n, block_n), most)
        span = triton.cdiv(triton.cdiv(n, block_n), splits) * block_n
        splits = triton.cdiv(n, span)
        high = torch.empty((batch, splits, kept), dtype=torch.float32, device=x.device)
        low = None if symmetric else torch.empty_like(high)
        grid = (batch * blocks_kept * splits,)
        partial_ranges_kernel[grid](
            source, factor, low, high, n, kept, blocks_kept, splits, span, *strides(source),
            PROPAGATE=propagate, **constants,
        )  # fmt: skip
        quantize_split_kernel[grid](
            source, factor, target, scale, zero_point_pointer, low, high, seed, n, kept, blocks_kept, splits, span,
            *strides(source), *strides(target), BLOCK_SPLITS=triton.next_power_of_2(splits), **constants,
        )  # fmt: skip
    return values, scale, zero_point


def variants(arch: Architecture) -> list[Variant]:
    """The variants a launcher call makes: rows held in registers, columns and long groups in two launches."""
    config = configuration("quantize", QuantizeConfig, arch, "all")
    rows = {"x_stride_n": 1, "values_stride_n": 1}
    columns = {"x_stride_kept": 1, "values_stride_kept": 1}
    found = []

    def add(
        name: str,
        function: Any,
        x: str,
        tile: tuple[int, int],
        unit_strides: dict[str, int],
        *,
        symmetric: bool = True,
        stochastic: bool = False,
        factor: bool = False,
        one_scale: bool = False,
    ) -> None:
        types = {
            "x_ptr": f"*{x}", "values_ptr": "*i8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32",
            "low_ptr": "*fp32", "high_ptr": "*fp32", "seed_ptr": "*i64", "factor_ptr": "*fp32",
        }  # fmt: skip
        constants = unit_strides | {
            "SYMMETRIC": symmetric,
            "PROPAGATE": factor,
            "BLOCK_KEPT": tile[0],
            "BLOCK_N": tile[1],
            "BLOCK_SPLITS": 16,
        }
        if one_scale:
            constants |= {"kept": 1}
        if symmetric:
            constants |= {"zero_point_ptr": None, "low_ptr": None}
        if not stochastic:
            constants |= {"seed_ptr": None}
        if not factor:
            constants |= {"factor_ptr": None}
        indivisible = ("blocks_kept", "splits")
        work = Elementwise(tile[0] * tile[1], BYTES[x] + (0 if function is partial_ranges_kernel else 1))
        num_warps = warps(*tile, config, arch)
        found.append(elementwise_variant(function, name, types, constants, indivisible, num_warps=num_warps, work=work))

    square, flat = (config.columns, config.elements // config.columns), (1, config.elements)
    add("fp16,row 4096", quantize_resident_kernel, "fp16", (1, 4096), rows)
    add("fp16,row 4096,factor", quantize_resident_kernel, "fp16", (1, 4096), rows, factor=True)
    affine = {"symmetric": False, "stochastic": True}
    add("bf16,row 16384,affine,stochastic", quantize_resident_kernel, "bf16", (1, 16384), rows, **affine)
    add("fp32,group 128,stochastic", quantize_resident_kernel, "fp32", (32, 128), rows, stochastic=True)
    add("bf16,columns of 256,factor", quantize_resident_kernel, "bf16", (config.columns, 256), columns, factor=True)
    add("fp16,columns,factor", partial_ranges_kernel, "fp16", square, columns, factor=True)
    add("fp32,tensor,affine", partial_ranges_kernel, "fp32", flat, rows, symmetric=False, one_scale=True)
    add("fp16,columns,factor", quantize_split_kernel, "fp16", square, columns, factor=True)
    add("fp32,tensor,affine,stochastic", quantize_split_kernel, "fp32", flat, rows, **affine, one_scale=True)
    return found
