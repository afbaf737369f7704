"""The scalars of one step, from the gradients and from a GradScaler, without waiting for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixft.ops.grad import grad_stats


@dataclass
class Scalars:
    """One-element FP32 tensors of one step on one device; None stands for 1, and for False in ``found_inf``.

    Attributes:
        inv_scale: what the gradients are multiplied by first.
        clip_coef: what they are multiplied by next, to be clipped.
        found_inf: not zero where the step is not to be taken.
        norm: of the unscaled gradients, before clipping; None where nothing asked for it.
    """

    inv_scale: Tensor | None = None
    clip_coef: Tensor | None = None
    found_inf: Tensor | None = None
    norm: Tensor | None = None

    def on(self, device: torch.device) -> "Scalars":
        """The same on ``device``."""
        moved = (self.inv_scale, self.clip_coef, self.found_inf, self.norm)
        return Scalars(*(None if value is None else at(value, device) for value in moved))


def scalars_of(
    grads: dict[torch.device, list[Tensor]],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
) -> Scalars:
    """The scalars of a step, on the first device of ``grads``.

    Args:
        grads: all gradients of the step, by device.
        grad_scale: the scale still in them, from a GradScaler.
        found_inf: what the scaler found itself.
        max_norm: what their norm is clipped to; with it, gradients are looked at whatever the scaler found.
        skip_nonfinite: whether to look at them where no scaler did.
    """
    home = next(iter(grads))
    scalars = Scalars()
    if grad_scale is not None:
        scalars.inv_scale = at(grad_scale, home).reciprocal()
    if found_inf is not None:
        scalars.found_inf = at(found_inf, home)
    if max_norm is None and (found_inf is not None or not skip_nonfinite):
        return scalars
    stats = [grad_stats(listed) for listed in grads.values()]
    bad = sum(at(nonfinite.sum(), home) for _, nonfinite in stats) > 0
    if max_norm is not None:
        norm = sum(at(squares.sum(), home) for squares, _ in stats).sqrt()
        if scalars.inv_scale is not None:
            norm = norm * scalars.inv_scale
        # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
        bad = bad | ~norm.isfinite()
        # torch.nn.utils.clip_grad_norm_ has the same small addend.
        scalars.clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        scalars.norm = norm.reshape(())
    scalars.found_inf = bad.float() if scalars.found_inf is None else torch.maximum(scalars.found_inf, bad.float())
    return scalars


def at(scalar: Tensor, device: torch.device) -> Tensor:
    """``scalar`` as FP32 on ``device``."""
    # A copy to the host is read at once, so that one has to wait.
    return scalar.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
