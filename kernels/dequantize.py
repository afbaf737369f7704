"""The inverse of int8 quantization, along one dimension of a 3-D view.

    x = (Q - Z) S

``Q`` is int8 [outer, n, inner], any strides; ``S`` FP32 and ``Z`` int32 or None are [outer, 1, inner], as
``mixft.kernels.quantize`` gives them. ``x`` is FP16, BF16 or FP32 of Q's shape, contiguous; the arithmetic is FP32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .configuration import configuration
from .quantize_tiles import QuantizeConfig, batch_n_kept, strides, tile, warps
from .variant import BYTES, Elementwise, Variant, elementwise_variant


@triton.jit(do_not_specialize=["blocks_kept", "blocks_n"])
def dequantize_kernel(
    values_ptr, scale_ptr, zero_point_ptr, out_ptr,
    n, kept, blocks_kept, blocks_n,
    values_stride_batch, values_stride_n, values_stride_kept,
    out_stride_batch, out_stride_n, out_stride_kept,
    BLOCK_KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // blocks_n // blocks_kept).to(tl.int64)
    k = (program // blocks_n % blocks_kept).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    j = (program % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (k < kept)[:, None] & (j < n)[None, :]
    source = values_ptr + batch * values_stride_batch + k[:, None] * values_stride_kept + j[None, :] * values_stride_n
    y = tl.load(source, mask=mask, other=0).to(tl.float32)
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + batch * kept + k, mask=k < kept, other=0)
        y -= zero_point.to(tl.float32)[:, None]
    y *= tl.load(scale_ptr + batch * kept + k, mask=k < kept, other=0.0)[:, None]
    target = out_ptr + batch * out_stride_batch + k[:, None] * out_stride_kept + j[None, :] * out_stride_n
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(values - zero_point) scale as ``dtype``, contiguous.

    Args:
        values: int8 [outer, n, inner], any strides.
        scale: FP32 [outer, 1, inner], contiguous.
        zero_point: int32 of scale's shape, contiguous, or None.
        dtype: FP16, BF16 or FP32.
    """
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    arch = architecture_of(values.device)
    config = configuration("quantize", QuantizeConfig, arch, "all")
    inner = values.shape[2]
    source, target = batch_n_kept(values, inner), batch_n_kept(out, inner)
    batch, n, kept = source.shape
    block_kept, block_n, resident = tile(source, config)
    if resident and block_kept * block_n > config.elements:
        block_n = config.elements // block_kept
    blocks_kept, blocks_n = triton.cdiv(kept, block_kept), triton.cdiv(n, block_n)
    with torch.cuda.device_of(values):
        dequantize_kernel[(batch * blocks_kept * blocks_n,)](
            source, scale, zero_point, target, n, kept, blocks_kept, blocks_n, *strides(source), *strides(target),
            BLOCK_KEPT=block_kept, BLOCK_N=block_n, num_warps=warps(block_kept, block_n, config, arch),
            num_stages=1,
        )  # fmt: skip
    return out


def variants(arch: Architecture) -> list[Variant]:
    """The variants a launcher call makes: scales by row and by column, without and with a zero point."""
    config = configuration("quantize", QuantizeConfig, arch, "all")
    found = []
    for name, dtype, block_kept, adjacent in (
        ("fp16,rows", "fp16", 1, "n"),
        ("fp32,columns,affine", "fp32", config.columns, "kept"),
    ):
        types = {"values_ptr": "*i8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32", "out_ptr": f"*{dtype}"}
        blocks = block_kept, config.elements // block_kept
        constants = {"BLOCK_KEPT": blocks[0], "BLOCK_N": blocks[1]}
        constants |= {f"values_stride_{adjacent}": 1, f"out_stride_{adjacent}": 1}
        if not name.endswith("affine"):
            constants |= {"zero_point_ptr": None}
        options = {"num_warps": warps(*blocks, config, arch), "work": Elementwise(config.elements, BYTES[dtype] + 1)}
        indivisible = ("blocks_kept", "blocks_n")
        found.append(elementwise_variant(dequantize_kernel, name, types, constants, indivisible, **options))
    return found
