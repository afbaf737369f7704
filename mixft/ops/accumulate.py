"""``mixft.ops.accumulate_``: micro-batch gradients added to FP32 buffers, unscaled, checked and cleared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.cpu import accumulate as routines

from .grad import checked_gradients
from .layout import all_contiguous, in_layout_of, is_dense, without_negation
from .registration import change_in_place, define_in_place_op
from .validation import check_counts, check_dtype, check_scalar

accumulate_gradients_ = define_in_place_op(
    routines.accumulate_gradients_, mutates_args=("grads", "buffers", "found_inf", "nonfinite")
)


@torch.no_grad()
def accumulate_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    found_inf: Tensor,
    nonfinite: Tensor,
    inv_scale: Tensor | None = None,
    overwrite: bool = False,
    clear: bool = False,
) -> None:
    """Add every gradient times ``inv_scale`` to its FP32 buffer and note NaN and Inf, one launch for each dtype.

    Product and sum are FP32. A NaN or Inf takes part in the sum like any number; what counts is the gradient before
    the multiplication. No host synchronisation.

    Args:
        grads: dense FP16, BF16 or FP32 tensors of any shapes and strides, dtypes mixed, all on one device.
        buffers: FP32 tensors without gaps, one a gradient and of its shape, changed in place.
        found_inf: one-element FP32 tensor, set to 1.0 where a gradient holds a NaN or Inf and never back to 0.
        nonfinite: contiguous int64 [len(grads)]; each element grows by the number of NaN and Inf of one gradient.
        inv_scale: one-element FP32 tensor, or None for 1.
        overwrite: replace what the buffers hold instead of adding to it.
        clear: set the gradients to zero.

    Raises:
        TypeError: a gradient is not FP16, BF16 or FP32, a buffer or a scalar tensor not FP32, or ``nonfinite`` not
            int64.
        ValueError: lists of different lengths, a tensor of another shape or device than its gradient, or a sparse one
            or a buffer with gaps.
    """
    grads, buffers = checked_gradients(grads), list(buffers)
    if len(grads) != len(buffers):
        raise ValueError(f"buffers has {len(buffers)} tensors for {len(grads)} gradients; it must have one for each")
    if not grads:
        return
    device = grads[0].device
    for position, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        check_dtype(f"buffers[{position}]", buffer, (torch.float32,))
        if buffer.shape != grad.shape or buffer.device != device or not is_dense(buffer):
            raise ValueError(
                f"buffers[{position}] has shape {tuple(buffer.shape)}, strides {buffer.stride()} and is on "
                f"{buffer.device}; it must be a tensor without gaps of the gradient's shape {tuple(grad.shape)} on "
                f"{device}"
            )
    if inv_scale is not None:
        check_scalar("inv_scale", inv_scale, device)
    check_scalar("found_inf", found_inf, device)
    check_counts(nonfinite, len(grads), device)
    accumulate_unchecked_(grads, buffers, inv_scale, found_inf, nonfinite, overwrite, clear)


def accumulate_unchecked_(
    grads: list[Tensor],
    buffers: list[Tensor],
    inv_scale: Tensor | None,
    found_inf: Tensor,
    nonfinite: Tensor,
    overwrite: bool,
    clear: bool,
) -> None:
    """:func:`accumulate_` on arguments that are known to be right."""
    arranged = without_negation(grads)
    if not all_contiguous(arranged, buffers):
        arranged = [in_layout_of(buffer, grad) for buffer, grad in zip(buffers, arranged, strict=True)]
    changed = [*arranged, *buffers] if clear else buffers
    arguments = arranged, buffers, inv_scale, found_inf, nonfinite, overwrite, clear
    change_in_place(accumulate_gradients_, changed, *arguments)
    if clear:
        for grad, copy in zip(grads, arranged, strict=True):
            if copy is not grad:
                grad.zero_()
