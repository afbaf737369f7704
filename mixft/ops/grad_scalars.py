"""``mixft.ops.grad_scalars``: norm, clip coefficient and overflow of a whole model's gradients in one read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grad import checked_gradients
from .layout import all_contiguous, is_dense
from .registration import define_op, without_dispatch
from .validation import check_scalar


@define_op("grad_scalars")
def gradient_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty(3, dtype=torch.float32), grads[0].new_empty(len(grads), dtype=torch.int64)


class GradScalars(NamedTuple):
    """What an optimizer step needs to know of its gradients; device tensors, which nobody has waited for.

    Attributes:
        norm: 0-d FP32, the 2-norm over all gradients after unscaling.
        clip_coef: 0-d FP32 that gradients are to be multiplied by.
        found_inf: 0-d FP32, 1.0 where the step is to be skipped, else 0.0.
        nonfinite: int64 [gradients], the number of NaN and Inf elements of each.
    """

    norm: Tensor
    clip_coef: Tensor
    found_inf: Tensor
    nonfinite: Tensor


@torch.no_grad()
def grad_scalars(
    grads: Sequence[Tensor],
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
) -> GradScalars:
    """Global norm, clip coefficient, overflow flag and its attribution in one read, without host synchronisation.

    One launch for each dtype; the same input gives the same bits on every call.

    Args:
        grads: dense FP16, BF16 or FP32 tensors of any shapes and strides, dtypes mixed, at least one, all on one
            device. They are left as they are.
        inv_scale: one-element FP32 tensor that the gradients are yet to be multiplied by, or None for 1.
        found_inf: one-element FP32 tensor of an earlier finding, which the result includes, or None.
        max_norm: the norm to clip to; ``clip_coef`` is ``min(max_norm / (norm + 1e-6), 1)``, as in
            ``torch.nn.utils.clip_grad_norm_``, and a norm beyond FP32 counts as an overflow. None: ``clip_coef`` is 1.

    Raises:
        TypeError: a gradient is not FP16, BF16 or FP32, or a scalar tensor is not FP32.
        ValueError: there is no gradient, one is sparse or on another device, a scalar tensor has not one element, or
            ``max_norm`` is not positive.
    """
    grads = checked_gradients(grads)
    if not grads:
        raise ValueError("grads is empty; it must hold at least one gradient")
    for name, scalar in (("inv_scale", inv_scale), ("found_inf", found_inf)):
        if scalar is not None:
            check_scalar(name, scalar, grads[0].device)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be a positive number or None")
    return grad_scalars_unchecked(grads, inv_scale, found_inf, max_norm)


def grad_scalars_unchecked(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> GradScalars:
    """:func:`grad_scalars` on arguments that are known to be right."""
    if not all_contiguous(grads):
        grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
    scalars, nonfinite = without_dispatch(gradient_scalars, grads[0])(grads, inv_scale, found_inf, max_norm)
    return GradScalars(*scalars.unbind(), nonfinite)
