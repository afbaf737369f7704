"""The scalars of one step, from the gradients and from a GradScaler, without waiting for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixft.ops.grad_scalars import scalars_of


@dataclass
class Scalars:
    """One-element FP32 tensors of one step on one device; None stands for 1, and for False in ``found_inf``.

    Attributes:
        inv_scale: what the gradients are multiplied by first.
        clip_coef: what they are multiplied by next, to be clipped.
        found_inf: 0-d, not zero where the step is not to be taken.
        norm: of the unscaled gradients, before clipping; None where nothing asked for it.
        nonfinite: int64, for every device of the step the number of NaN and Inf elements of each gradient; empty where
            nobody looked.
    """

    inv_scale: Tensor | None = None
    clip_coef: Tensor | None = None
    found_inf: Tensor | None = None
    norm: Tensor | None = None
    nonfinite: tuple[Tensor, ...] = ()

    def on(self, device: torch.device) -> "Scalars":
        """The same on ``device``."""
        moved = (self.inv_scale, self.clip_coef, self.found_inf, self.norm)
        return Scalars(*(None if value is None else at(value, device) for value in moved))


def step_scalars(
    grads: dict[torch.device, list[Tensor]],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
    skip_nonfinite: bool = True,
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
    inv_scale = None if grad_scale is None else at(grad_scale, home).reciprocal()
    found_inf = None if found_inf is None else at(found_inf, home).reshape(())
    if max_norm is None and (found_inf is not None or not skip_nonfinite):
        return Scalars(inv_scale, None, found_inf)
    if len(grads) == 1:
        found = scalars_of(grads[home], inv_scale, found_inf, max_norm)
        norm, clip_coef, found_inf = found.norm, found.clip_coef, found.found_inf
        nonfinite = (found.nonfinite,)
    else:
        parts = [scalars_of(listed, None, None, None) for listed in grads.values()]
        norm = torch.stack([at(part.norm, home) for part in parts]).square().sum().sqrt()
        if inv_scale is not None:
            norm = norm * inv_scale.reshape(())
        nonfinite = tuple(part.nonfinite for part in parts)
        findings = [at(part.found_inf, home) for part in parts]
        findings += [] if found_inf is None else [found_inf]
        # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
        findings += [] if max_norm is None else [(~norm.isfinite()).float()]
        found_inf = torch.stack(findings).amax()
        clip_coef = None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if max_norm is None:
        return Scalars(inv_scale, None, found_inf, None, nonfinite)
    return Scalars(inv_scale, clip_coef, found_inf, norm, nonfinite)


def at(scalar: Tensor, device: torch.device) -> Tensor:
    """``scalar`` as FP32 on ``device``."""
    if scalar.dtype == torch.float32 and scalar.device == device:
        return scalar
    # A copy to the host has to wait, as it is read at once.
    return scalar.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
