"""An optimizer's gradients, sorted by who can check and unscale them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixft.ops import unscale_
from mixft.ops.grad import served_together
from mixft.ops.grad_scalars import grad_scalars_unchecked
from mixft.ops.validation import FLOATS, is_dtensor

from .overflow import Counts


@dataclass
class Gradients:
    """An optimizer's gradients on one device.

    Attributes:
        params: parameters whose gradients mixft's ops take.
        ours: those gradients.
        others: the rest, FP64 and tensor subclasses, by dtype and for DTensors by their placement too.
        counted: (parameter, gradient) of those of the rest whose elements can be counted: plain tensors, and what this
            process holds of a DTensor.
    """

    params: list[Tensor] = field(default_factory=list)
    ours: list[Tensor] = field(default_factory=list)
    others: dict[tuple, list[Tensor]] = field(default_factory=dict)
    counted: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def count_others(self) -> list[Counts]:
        """NaN and Inf elements of the others, where they can be counted."""
        if not self.counted:
            return []
        counts = [grad.numel() - grad.isfinite().sum() for _, grad in self.counted]
        return [([param for param, _ in self.counted], torch.stack(counts))]


def is_taken(grad: Tensor) -> bool:
    """Whether mixft's ops take a strided gradient: not FP64, and no tensor subclass."""
    return type(grad) is Tensor and grad.dtype in FLOATS


def taken_at_once(grads: list[Tensor]) -> bool:
    """Whether they take all of these in one call, which most lists of gradients are fit for."""
    return set(map(type, grads)) == {Tensor} and served_together(grads)


@torch.no_grad()
def gradients_of(optimizer: torch.optim.Optimizer) -> dict[torch.device, Gradients]:
    """The gradients of ``optimizer`` by device; sparse ones by their values."""
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    grads = [param.grad for param in params]
    if taken_at_once(grads):
        return {grads[0].device: Gradients(params, grads)}
    found: dict[torch.device, Gradients] = {}
    for param, grad in zip(params, grads, strict=True):
        if grad.is_sparse:
            if grad.dtype is torch.float16:
                # The values of one index may overflow only in their sum, so that is what has to be checked.
                grad = param.grad = grad.coalesce()
            grad = grad._values()
        here = found.get(grad.device)
        if here is None:
            here = found[grad.device] = Gradients()
        if is_taken(grad):
            here.params.append(param)
            here.ours.append(grad)
            continue
        # torch's check agrees on what it finds with the other processes of the first DTensor that it is given.
        placed = (grad.device_mesh, grad.placements) if is_dtensor(grad) else ()
        here.others.setdefault((grad.dtype, *placed), []).append(grad)
        piece = grad.to_local() if is_dtensor(grad) else grad
        if type(piece) is Tensor:
            here.counted.append((param, piece))
    return found


def unscale_gradients(
    optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor
) -> tuple[dict[torch.device, Tensor], list[Counts]]:
    """Multiply the gradients by ``inv_scale`` in place.

    Returns:
        By device, a copy of ``found_inf`` that is 1 where a gradient there is NaN or Inf; and how many elements are.
    """
    found, nonfinite = {}, []
    for device, gradients in gradients_of(optimizer).items():
        found[device] = found_inf.to(device, non_blocking=True, copy=True)
        local_inv_scale = inv_scale.to(device, non_blocking=True)
        counts = torch.zeros(len(gradients.ours), dtype=torch.int64, device=device)
        nonfinite += [(gradients.params, counts), *gradients.count_others()]
        unscale_(gradients.ours, local_inv_scale, found[device], counts)
        for same in gradients.others.values():
            torch._amp_foreach_non_finite_check_and_unscale_(same, found[device], local_inv_scale)
    return found, nonfinite


def find_overflows(optimizer: torch.optim.Optimizer) -> tuple[dict[torch.device, Tensor], list[Counts]]:
    """The same finding as :func:`unscale_gradients`'s, with the gradients as they are."""
    found, nonfinite = {}, []
    for device, gradients in gradients_of(optimizer).items():
        found[device] = torch.zeros((), dtype=torch.float32, device=device)
        if gradients.ours:
            _, _, found[device], counts = grad_scalars_unchecked(gradients.ours, None, None, None)
            nonfinite.append((gradients.params, counts))
        nonfinite += gradients.count_others()
        for same in gradients.others.values():
            one = torch.ones((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(same, found[device], one)
    return found, nonfinite


def has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])
