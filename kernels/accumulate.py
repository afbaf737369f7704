"""Micro-batch gradients added to FP32 buffers in one launch per dtype: unscaled, checked and cleared on the way.

For every element of every gradient::

    buffer <- buffer + g * inv_scale        or, for the first micro-batch of a step, buffer <- g * inv_scale
    g      <- 0                             where the launch clears

``found_inf`` becomes 1 where some g is NaN or Inf, and ``nonfinite`` grows by the number of such elements of each
tensor. Gradients are FP16, BF16 or FP32 tensors of any size, ``buffers`` FP32 tensors with their elements in the same
order without gaps, ``inv_scale`` and ``found_inf`` one-element FP32 tensors, ``nonfinite`` int64 [tensors].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .grad import is_nonfinite, multi_tensor_config
from .multi_tensor import (
    TRITON_NAMES,
    TRITON_TYPES,
    addresses,
    chunk_of_program,
    dtypes_of,
    groups_of,
    launches,
    load,
    multi_tensor_variant,
    sizes_of,
    tensor_pointer,
)
from .variant import Variant

# Table columns; POSITION is the tensor's place in the caller's list.
SIZE, GRAD, BUFFER, POSITION = (tl.constexpr(i) for i in range(4))
COLUMNS = tl.constexpr(4)


@triton.jit
def accumulate_block(
    grad, buffer, at, mask, factor, GRAD_TYPE: tl.constexpr, OVERWRITE: tl.constexpr, CLEAR: tl.constexpr
):
    # Zero beyond the end, where nothing may be counted.
    g = load(grad + at, mask).to(tl.float32)
    total = g * factor
    if not OVERWRITE:
        total += tl.load(buffer + at, mask=mask)
    tl.store(buffer + at, total, mask=mask)
    if CLEAR:
        tl.store(grad + at, tl.zeros_like(g).to(GRAD_TYPE), mask=mask)
    return is_nonfinite(g)


@triton.jit
def accumulate_kernel(
    table, program_tensor, program_chunk, inv_scale, found_inf, nonfinite,
    GRAD_TYPE: tl.constexpr, OVERWRITE: tl.constexpr, CLEAR: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size = chunk_of_program(table, program_tensor, program_chunk, COLUMNS, CHUNK)
    grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
    buffer = tensor_pointer(row, BUFFER, tl.float32, ALIGNED) + start
    factor = 1.0
    if inv_scale is not None:
        factor = tl.load(inv_scale)
    lanes = tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    # Full chunks go without a mask: a mask that the compiler cannot see through makes every access scalar.
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            bad += accumulate_block(grad, buffer, offset + lanes, None, factor, GRAD_TYPE, OVERWRITE, CLEAR)
    else:
        left = (size - start).to(tl.int32)
        for offset in range(0, left, BLOCK):
            at = offset + lanes
            bad += accumulate_block(grad, buffer, at, at < left, factor, GRAD_TYPE, OVERWRITE, CLEAR)
    count = tl.sum(bad, 0)
    if count > 0:
        tl.store(found_inf, 1.0)
        tl.atomic_add(nonfinite + tl.load(row + POSITION), count.to(tl.int64))


def accumulate_gradients_(
    grads: list[Tensor],
    buffers: list[Tensor],
    inv_scale: Tensor | None,
    found_inf: Tensor,
    nonfinite: Tensor,
    overwrite: bool,
    clear: bool,
) -> None:
    """Launch ``accumulate_kernel`` once for each (dtype, alignment) among ``grads``."""
    device = grads[0].device
    columns = sizes_of(grads), addresses(grads), addresses(buffers), range(len(grads))
    groups = groups_of((dtypes_of(grads),), columns, (GRAD.value, POSITION.value))
    with torch.cuda.device_of(grads[0]):
        config = multi_tensor_config(architecture_of(device))
        for (dtype,), table, programs, constants in launches(groups, config, device):
            accumulate_kernel[(programs.count,)](
                table, programs.tensor, programs.chunk, inv_scale, found_inf, nonfinite,
                GRAD_TYPE=TRITON_TYPES[dtype], OVERWRITE=overwrite, CLEAR=clear,
                **constants,
            )  # fmt: skip


def variants(arch: Architecture) -> list[Variant]:
    return [
        _variant(arch, torch.float16),
        _variant(arch, torch.bfloat16),
        _variant(arch, torch.float32),
        _variant(arch, torch.float16, overwrite=True),
        _variant(arch, torch.float16, clear=True),
        _variant(arch, torch.bfloat16, scaled=False, overwrite=True),
        _variant(arch, torch.float16, is_aligned=False),
    ]


def _variant(
    arch: Architecture,
    dtype: torch.dtype,
    *,
    scaled: bool = True,
    overwrite: bool = False,
    clear: bool = False,
    is_aligned: bool = True,
) -> Variant:
    flags = {"unscaled": not scaled, "overwrite": overwrite, "clear": clear}
    return multi_tensor_variant(
        "accumulate",
        [TRITON_NAMES[dtype], *(flag for flag, is_set in flags.items() if is_set)],
        accumulate_kernel,
        {"inv_scale": "*fp32" if scaled else None, "found_inf": "*fp32", "nonfinite": "*i64"},
        {"GRAD_TYPE": TRITON_TYPES[dtype], "OVERWRITE": overwrite, "CLEAR": clear},
        multi_tensor_config(arch),
        is_aligned,
        dtype.itemsize * (2 if clear else 1) + (4 if overwrite else 8),
    )
