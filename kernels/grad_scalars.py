"""What an optimizer step needs to know of its gradients, in one read and one launch a dtype.

For gradients g_1 .. g_n of a whole model, with s = ``inv_scale`` and c = ``max_norm``::

    nonfinite_i = number of NaN and Inf elements of g_i
    norm        = s * sqrt(sum of squares of every element)
    clip_coef   = min(c / (norm + 1e-6), 1)        as torch.nn.utils.clip_grad_norm_; 1 without max_norm
    found_inf   = 1 where any nonfinite_i > 0, where the given found_inf is not 0, or, with max_norm, norm is not finite

Gradients are FP16, BF16 or FP32 tensors of any size whose elements fill their storage without gaps; ``inv_scale`` and
``found_inf`` one-element FP32 tensors or None. Arithmetic is FP32. A fixed number of programs goes over the chunks of
one launch, each adding its own in order; the last program to finish of all launches adds the programs' sums in order,
so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .grad import (
    COLUMNS,
    GRAD,
    KINDS,
    POSITION,
    SIZE,
    add_statistics,
    groups_of_gradients,
    is_nonfinite,
    multi_tensor_config,
)
from .multi_tensor import (
    TRITON_NAMES,
    TRITON_TYPES,
    counts_for,
    launches,
    multi_tensor_variant,
    tensor_pointer,
    zero_counts,
)
from .variant import Variant

# Programs of one launch: enough to fill every supported GPU, few enough for one program to add what they leave.
PROGRAMS = 2048
# Values at a time when the last program finishes; more would take registers from the reading loop.
FINISH_BLOCK = tl.constexpr(256)


@triton.jit
def finish_scalars(
    partial_sum, partials, counts, tensors, inv_scale, found_inf, max_norm, scalars, nonfinite, BLOCK: tl.constexpr
):
    """Turn what all programs have left into the results, and set the counts back to zero."""
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, partials, BLOCK):
        # Past the first-level cache, which knows nothing of other multiprocessors' stores.
        left = offset + lanes < partials
        squares += tl.load(partial_sum + offset + lanes, mask=left, other=0.0, cache_modifier=".cg")
    bad = tl.zeros([BLOCK], dtype=tl.int64)
    for offset in range(0, tensors, BLOCK):
        left = offset + lanes < tensors
        count = tl.load(counts + offset + lanes, mask=left, other=0, cache_modifier=".cg")
        tl.store(nonfinite + offset + lanes, count, mask=left)
        tl.store(counts + offset + lanes, tl.zeros_like(count), mask=left)
        bad += count
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    if inv_scale is not None:
        norm *= tl.load(inv_scale)
    found = tl.where(tl.sum(bad, 0) > 0, 1.0, 0.0)
    if found_inf is not None:
        found = tl.where(tl.load(found_inf) != 0.0, 1.0, found)
    clip_coef = 1.0
    if max_norm is not None:
        # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
        found = tl.where(is_nonfinite(norm) != 0, 1.0, found)
        clip_coef = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scalars, norm)
    tl.store(scalars + 1, clip_coef)
    tl.store(scalars + 2, found)


@triton.jit(do_not_specialize=["chunks", "first_partial", "partials", "tensors", "inv_scale", "found_inf"])
def grad_scalars_kernel(
    table, chunk_tensor, chunk_index, chunks,
    partial_sum, first_partial, partials, counts, tensors,
    inv_scale, found_inf, max_norm, scalars, nonfinite,
    GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
        row = table + tl.load(chunk_tensor + number).to(tl.int64) * COLUMNS
        start = tl.load(chunk_index + number).to(tl.int64) * CHUNK
        grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
        size = tl.load(row + SIZE)
        squares, bad = add_statistics(grad, start, size, squares, tl.zeros([BLOCK], dtype=tl.int32), CHUNK, BLOCK)
        total = tl.sum(bad, 0)
        if total > 0:
            tl.atomic_add(counts + tl.load(row + POSITION), total.to(tl.int64))
    tl.store(partial_sum + first_partial + tl.program_id(0), tl.sum(squares, 0))

    # Every thread's stores and counts come before the ticket, and the last ticket before what is read then.
    tl.debug_barrier()
    tickets = counts + tensors
    if tl.atomic_add(tickets, 1) == partials - 1:
        finish_scalars(
            partial_sum, partials, counts, tensors, inv_scale, found_inf, max_norm, scalars, nonfinite, FINISH_BLOCK
        )
        tl.store(tickets, 0)


def gradient_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel once for each (dtype, alignment) among ``grads``; the last launch gives the results."""
    device = grads[0].device
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    nonfinite = torch.empty(len(grads), dtype=torch.int64, device=device)
    with torch.cuda.device_of(grads[0]):
        config = multi_tensor_config(architecture_of(device))
        listed = list(launches(groups_of_gradients(grads), config, device))
        # All launches share these counts: the last one reads what the others counted, and sets them back to zero. A
        # last launch that never comes, as after Ctrl-C while it compiles, would leave them dirty, so counts that
        # several launches share are made for this call alone.
        counts = (counts_for if len(listed) == 1 else zero_counts)(len(grads), device)
        grids = [min(launch.programs.count, PROGRAMS) for launch in listed]
        partial_sum = torch.empty(sum(grids), dtype=torch.float32, device=device)
        # A float always: Triton compiles the kernel once more for an integer.
        max_norm = None if max_norm is None else float(max_norm)
        first_partial = 0
        for ((dtype,), table, programs, constants), grid in zip(listed, grids, strict=True):
            grad_scalars_kernel[(grid,)](
                table, programs.tensor, programs.chunk, programs.count,
                partial_sum, first_partial, sum(grids), counts, len(grads),
                inv_scale, found_inf, max_norm, scalars, nonfinite,
                GRAD_TYPE=TRITON_TYPES[dtype],
                **constants,
            )  # fmt: skip
            first_partial += grid
    return scalars, nonfinite


def variants(arch: Architecture) -> list[Variant]:
    types = {
        "chunk_tensor": "*i32",
        "chunk_index": "*i32",
        "partial_sum": "*fp32",
        "counts": "*i64",
        "inv_scale": "*fp32",
        "found_inf": "*fp32",
        "max_norm": "fp32",
        "scalars": "*fp32",
        "nonfinite": "*i64",
        **dict.fromkeys(("chunks", "first_partial", "partials", "tensors"), "i32"),
    }
    return [
        multi_tensor_variant(
            "grad_scalars",
            [TRITON_NAMES[dtype]],
            grad_scalars_kernel,
            types,
            {"GRAD_TYPE": TRITON_TYPES[dtype]},
            multi_tensor_config(arch),
            is_aligned,
            dtype.itemsize,
            indivisible=("inv_scale", "found_inf"),
        )
        for dtype, is_aligned in KINDS
    ]
