"""Unscaling of gradients with the overflow check, and gradient statistics: one pass over any number of tensors."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from mixft.cpu import grad as routines

from .layout import all_contiguous, is_dense
from .registration import change_in_place, define_in_place_op, define_op, without_dispatch
from .validation import FLOATS, check_counts, check_scalar

unscale_gradients_ = define_in_place_op(routines.unscale_gradients_, mutates_args=("grads", "found_inf", "nonfinite"))


@define_op("grad")
def gradient_statistics(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    count = len(grads)
    return grads[0].new_empty(count, dtype=torch.float32), grads[0].new_empty(count, dtype=torch.int64)


@torch.no_grad()
def unscale_(grads: Sequence[Tensor], inv_scale: Tensor, found_inf: Tensor, nonfinite: Tensor | None = None) -> None:
    """Multiply every gradient by ``inv_scale`` in place and note whether any held a NaN or Inf.

    The rule is that of ``torch.amp.GradScaler.unscale_``: what counts is the gradient before the multiplication, and
    ``found_inf`` is set to 1.0 and never back to 0. Unlike it, FP16 gradients are accepted. The product is computed in
    FP32 and rounded once. One launch for each dtype, no host synchronisation.

    Args:
        grads: dense FP16, BF16 or FP32 tensors of any shapes and strides, dtypes mixed, all on one device.
        inv_scale: one-element FP32 tensor on that device.
        found_inf: one-element FP32 tensor on that device, changed in place.
        nonfinite: contiguous int64 [len(grads)] on that device, or None; each element grows by the number of NaN and
            Inf elements of one gradient.

    Raises:
        TypeError: a gradient is not FP16, BF16 or FP32, a scalar tensor is not FP32, or ``nonfinite`` is not int64.
        ValueError: a gradient is sparse or on another device, a scalar tensor has not one element, or ``nonfinite``
            not one a gradient.
    """
    grads = checked_gradients(grads)
    if not grads:
        return
    check_scalar("inv_scale", inv_scale, grads[0].device)
    check_scalar("found_inf", found_inf, grads[0].device)
    if nonfinite is not None:
        check_counts(nonfinite, len(grads), grads[0].device)
    if all_contiguous(grads) and not any(map(Tensor.is_neg, grads)):
        change_in_place(unscale_gradients_, grads, grads, inv_scale, found_inf, nonfinite)
        return
    dense = [(grad if is_dense(grad) else grad.contiguous()).resolve_neg() for grad in grads]
    change_in_place(unscale_gradients_, dense, dense, inv_scale, found_inf, nonfinite)
    for grad, unscaled in zip(grads, dense, strict=True):
        if unscaled is not grad:
            grad.copy_(unscaled)


@torch.no_grad()
def grad_stats(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of squares and number of non-finite elements of every gradient, in one read and without host synchronisation.

    Args:
        grads: dense FP16, BF16 or FP32 tensors of any shapes and strides, dtypes mixed, all on one device.

    Returns:
        ``(sum_of_squares, nonfinite)``, FP32 and int64, each [len(grads)]. Squares and sums are FP32 whatever the
        gradient's dtype. A NaN or Inf element takes part in the sum, which is then NaN or Inf; a sum of finite
        elements is Inf where it exceeds FP32, and the count is what tells the two apart. The same input gives the same
        bits on every call.

    Raises:
        TypeError: a gradient is not FP16, BF16 or FP32.
        ValueError: a gradient is sparse or on another device.
    """
    grads = checked_gradients(grads)
    if not grads:
        return torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.int64)
    if not all_contiguous(grads):
        grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
    return without_dispatch(gradient_statistics, grads[0])(grads)


def checked_gradients(grads: Sequence[Tensor]) -> list[Tensor]:
    """``grads`` as a list; raises where one is of a dtype, layout or device that is not served."""
    grads = list(grads)
    if served_together(grads):
        return grads
    for position, grad in enumerate(grads):
        if grad.dtype not in FLOATS:
            raise TypeError(f"grads[{position}] is {grad.dtype}; gradients must be float16, bfloat16 or float32")
        if grad.layout != torch.strided:
            raise ValueError(f"grads[{position}] is {grad.layout}; gradients must be dense tensors")
        if grad.device != grads[0].device:
            raise ValueError(
                f"grads[{position}] is on {grad.device} and grads[0] on {grads[0].device}; pass one device at a time"
            )
    return grads


def served_together(grads: Sequence[Tensor]) -> bool:
    """Whether the ops here take all ``grads`` in one call: dense, of 16 or 32 bits, on one device."""
    # Attribute by attribute: tensor by tensor would take the host four times as long.
    return (
        set(map(attrgetter("dtype"), grads)).issubset(FLOATS)
        and set(map(attrgetter("layout"), grads)).issubset((torch.strided,))
        and len(set(map(attrgetter("device"), grads))) <= 1
    )
