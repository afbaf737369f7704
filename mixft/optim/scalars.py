"""The scalars of one step, from the gradients and from a GradScaler, without waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixft.ops.grad_scalars import GradScalars, grad_scalars_unchecked

from .sharding import Shards


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
    grads: dict[tuple[torch.device, Shards | None], list[Tensor]],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | int | None = None,
    max_norm: float | None = None,
    skip_nonfinite: bool = True,
    shards: Sequence[Shards] = (),
    home: torch.device | None = None,
) -> Scalars:
    """The scalars of a step, on the first device of ``grads``.

    Args:
        grads: all gradients of the step, by device and by the processes that hold the other parts of them, None for
            none.
        grad_scale: the scale still in them, from a GradScaler.
        found_inf: what the scaler found itself; the number 0 where it was shown no gradient.
        max_norm: what their norm is clipped to; with it, gradients are looked at whatever the scaler found.
        skip_nonfinite: whether to look at them where no scaler did.
        shards: all processes that hold other parts, in the same order everywhere, of gradients that may be missing here
            too. Their findings count.
        home: the device where there is no gradient, as may be with ``shards``.
    """
    home = next((device for device, _ in grads), home)
    inv_scale = None if grad_scale is None else at(grad_scale, home).reciprocal()
    if found_inf is not None:
        found_inf = at(found_inf, home).reshape(()) if isinstance(found_inf, Tensor) else torch.zeros((), device=home)
    looks = max_norm is not None or (found_inf is None and skip_nonfinite)
    if not looks and (found_inf is None or not shards):
        return Scalars(inv_scale, None, found_inf)
    if len(grads) == 1 and not shards:
        (only,) = grads.values()
        norm, clip_coef, found_inf, nonfinite = grad_scalars_unchecked(only, inv_scale, found_inf, max_norm)
        if max_norm is None:
            return Scalars(inv_scale, None, found_inf, None, (nonfinite,))
        return Scalars(inv_scale, clip_coef, found_inf, norm, (nonfinite,))
    parts = {where: grad_scalars_unchecked(listed, None, None, None) for where, listed in grads.items() if looks}
    totals = _totals([part for (_, divided), part in parts.items() if divided is None], found_inf, home)
    for processes in shards:
        own = [part for (_, divided), part in parts.items() if divided == processes]
        totals = totals + processes.total(_totals(own, found_inf, home))
    return _from_totals(totals, inv_scale, max_norm, tuple(part.nonfinite for part in parts.values()))


def _totals(parts: list[GradScalars], found_inf: Tensor | None, home: torch.device) -> Tensor:
    """FP64 [2]: the sum of squares over all ``parts``, and a number that is not 0 where anything was found."""
    rows = [torch.stack((at(part.norm, home), at(part.found_inf, home))) for part in parts]
    if found_inf is not None:
        rows.append(torch.stack((torch.zeros_like(found_inf), found_inf)))
    if not rows:
        return torch.zeros(2, dtype=torch.float64, device=home)
    # In FP64 the square of no FP32 number overflows.
    return torch.stack(rows).double().square().sum(0)


def _from_totals(
    totals: Tensor, inv_scale: Tensor | None, max_norm: float | None, nonfinite: tuple[Tensor, ...]
) -> Scalars:
    found_inf = (totals[1] != 0).float()
    if max_norm is None:
        return Scalars(inv_scale, None, found_inf, None, nonfinite)
    norm = totals[0].sqrt().float()
    if inv_scale is not None:
        norm = norm * inv_scale.reshape(())
    clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
    found_inf = torch.maximum(found_inf, (~norm.isfinite()).float())
    return Scalars(inv_scale, clip_coef, found_inf, norm, nonfinite)


def at(scalar: Tensor, device: torch.device) -> Tensor:
    """``scalar`` as FP32 on ``device``."""
    if scalar.dtype == torch.float32 and scalar.device == device:
        return scalar
    # A copy to the host has to wait, as it is read at once.
    return scalar.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
