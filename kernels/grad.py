"""Gradients of a whole model: unscale with the overflow check, and read-only statistics.

``unscale_gradients_``   g <- g * inv_scale for every element; found_inf <- 1 where some g was NaN or Inf before it,
                         and nonfinite, where it is given, grows by the number of such elements of every tensor.
``gradient_statistics``  per tensor, sum of g^2 in FP32 and the number of elements that are NaN or Inf.

Gradients are FP16, BF16 or FP32 tensors of any size whose elements fill their storage without gaps, in any order;
``inv_scale`` and ``found_inf`` are one-element FP32 tensors. Arithmetic is FP32, with one rounding at the store.
Unscaling is one launch per (dtype, alignment). The statistics are deterministic: every chunk writes its partial result,
and a second launch adds them in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .configuration import configuration
from .multi_tensor import (
    TRITON_NAMES,
    TRITON_TYPES,
    Group,
    MultiTensorConfig,
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

# Table columns: number of elements, address of the gradient, position of the gradient in the caller's list.
SIZE, GRAD, POSITION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COLUMNS = tl.constexpr(3)

# The (dtype, whether aligned) of gradients that variants are listed for.
KINDS = ((torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float16, False))


@triton.jit
def is_nonfinite(x):
    # Not "~": the interpreter of Triton 3.2 has no such operation on booleans.
    return tl.where(tl.abs(x) < float("inf"), 0, 1)


@triton.jit
def unscale_block(grad, mask, factor, GRAD_TYPE: tl.constexpr):
    g = load(grad, mask).to(tl.float32)
    tl.store(grad, (g * factor).to(GRAD_TYPE), mask=mask)
    return is_nonfinite(g)


@triton.jit
def unscale_kernel(
    table, program_tensor, program_chunk, inv_scale, found_inf, nonfinite,
    GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size = chunk_of_program(table, program_tensor, program_chunk, COLUMNS, CHUNK)
    grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
    lanes = tl.arange(0, BLOCK)
    factor = tl.load(inv_scale)
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    # Full chunks go without a mask: a mask that the compiler cannot see through makes every access scalar.
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            bad += unscale_block(grad + offset + lanes, None, factor, GRAD_TYPE)
    else:
        left = (size - start).to(tl.int32)
        for offset in range(0, left, BLOCK):
            bad += unscale_block(grad + offset + lanes, offset + lanes < left, factor, GRAD_TYPE)
    count = tl.sum(bad, 0)
    if count > 0:
        tl.store(found_inf, 1.0)
        if nonfinite is not None:
            tl.atomic_add(nonfinite + tl.load(row + POSITION), count.to(tl.int64))


@triton.jit
def add_statistics(grad, start, size, squares, bad, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Add the squares of one chunk to ``squares``, lane by lane, and its NaN and Inf elements to ``bad``."""
    lanes = tl.arange(0, BLOCK)
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            g = tl.load(grad + offset + lanes).to(tl.float32)
            squares += g * g
            bad += is_nonfinite(g)
    else:
        left = (size - start).to(tl.int32)
        for offset in range(0, left, BLOCK):
            g = tl.load(grad + offset + lanes, mask=offset + lanes < left, other=0.0).to(tl.float32)
            squares += g * g
            bad += is_nonfinite(g)
    return squares, bad


@triton.jit
def partial_stats_kernel(
    table, program_tensor, program_chunk, partial_sum, partial_count,
    GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size = chunk_of_program(table, program_tensor, program_chunk, COLUMNS, CHUNK)
    grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
    squares, bad = add_statistics(
        grad, start, size, tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.int32), CHUNK, BLOCK
    )
    program = tl.program_id(0)
    tl.store(partial_sum + program, tl.sum(squares, 0))
    tl.store(partial_count + program, tl.sum(bad, 0))


@triton.jit
def reduce_stats_kernel(
    table, first_program, partial_sum, partial_count, sum_of_squares, nonfinite, BLOCK: tl.constexpr
):
    tensor = tl.program_id(0).to(tl.int64)
    begin = tl.load(first_program + tensor)
    end = tl.load(first_program + tensor + 1)
    position = tl.load(table + tensor * COLUMNS + POSITION)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    bad = tl.zeros([BLOCK], dtype=tl.int64)
    for offset in range(begin, end, BLOCK):
        mask = offset + lanes < end
        squares += tl.load(partial_sum + offset + lanes, mask=mask, other=0.0)
        bad += tl.load(partial_count + offset + lanes, mask=mask, other=0).to(tl.int64)
    tl.store(sum_of_squares + position, tl.sum(squares, 0))
    tl.store(nonfinite + position, tl.sum(bad, 0))


def unscale_gradients_(grads: list[Tensor], inv_scale: Tensor, found_inf: Tensor, nonfinite: Tensor | None) -> None:
    """Launch ``unscale_kernel`` once for each (dtype, alignment) among ``grads``."""
    if not grads:
        return
    device = grads[0].device
    with torch.cuda.device_of(grads[0]):
        config = multi_tensor_config(architecture_of(device))
        for (dtype,), table, programs, constants in launches(groups_of_gradients(grads), config, device):
            unscale_kernel[(programs.count,)](
                table, programs.tensor, programs.chunk, inv_scale, found_inf, nonfinite,
                GRAD_TYPE=TRITON_TYPES[dtype],
                **constants,
            )  # fmt: skip


def gradient_statistics(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Launch the partial and the reducing kernel once for each (dtype, alignment) among ``grads``."""
    device = grads[0].device
    sum_of_squares = torch.empty(len(grads), dtype=torch.float32, device=device)
    nonfinite = torch.empty(len(grads), dtype=torch.int64, device=device)
    with torch.cuda.device_of(grads[0]):
        config = multi_tensor_config(architecture_of(device))
        for (dtype,), table, programs, constants in launches(groups_of_gradients(grads), config, device):
            partial_sum = torch.empty(programs.count, dtype=torch.float32, device=device)
            partial_count = torch.empty(programs.count, dtype=torch.int32, device=device)
            partial_stats_kernel[(programs.count,)](
                table, programs.tensor, programs.chunk, partial_sum, partial_count,
                GRAD_TYPE=TRITON_TYPES[dtype],
                **constants,
            )  # fmt: skip
            reduce_stats_kernel[(len(table),)](
                table, programs.first, partial_sum, partial_count, sum_of_squares, nonfinite,
                BLOCK=config.block, num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
    return sum_of_squares, nonfinite


def variants(arch: Architecture) -> list[Variant]:
    config = multi_tensor_config(arch)
    unscaling = {"inv_scale": "*fp32", "found_inf": "*fp32", "nonfinite": "*i64"}
    partials = {"partial_sum": "*fp32", "partial_count": "*i32"}
    found = []
    for dtype, is_aligned in KINDS:
        labels, constants = [TRITON_NAMES[dtype]], {"GRAD_TYPE": TRITON_TYPES[dtype]}
        for name, function, types, passes in (
            ("unscale", unscale_kernel, unscaling, 2),
            ("partial_stats", partial_stats_kernel, partials, 1),
        ):
            floor = passes * dtype.itemsize
            found.append(multi_tensor_variant(name, labels, function, types, constants, config, is_aligned, floor))
    signature = {"table": "*i64", "first_program": "*i32", **partials, "sum_of_squares": "*fp32", "nonfinite": "*i64"}
    found.append(
        Variant(
            name="reduce_stats",
            function=reduce_stats_kernel,
            signature=signature,
            constexprs={"BLOCK": config.block},
            divisible_by_16=tuple(signature),
            num_warps=config.num_warps,
            wide_loads=False,
        )
    )
    return found


def multi_tensor_config(arch: Architecture) -> MultiTensorConfig:
    return configuration("grad", MultiTensorConfig, arch, "all")


def groups_of_gradients(grads: Sequence[Tensor]) -> list[Group]:
    """The launches over ``grads``; the table's last column is the tensor's place in the list."""
    columns = sizes_of(grads), addresses(grads), range(len(grads))
    return groups_of((dtypes_of(grads),), columns, (GRAD.value, POSITION.value))
