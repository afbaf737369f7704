"""Gradient norms and clipping with the signatures and results of ``torch.nn.utils``, in FP32 and without waiting."""

import types
import warnings
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from mixft.ops import unscale_
from mixft.ops.grad_scalars import grad_scalars_unchecked

from .gradients import is_taken, taken_at_once

Parameters = Tensor | Iterable[Tensor]


@torch.no_grad()
def grad_norm(parameters: Parameters, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """The norm of all gradients of ``parameters``, as if they were one vector; None gradients are left out.

    ``torch.nn.utils.get_total_norm`` on the gradients, and like it the p-norm of the tensors' p-norms, which for
    ``norm_type=0`` is the number of tensors that are not all zero. Each gradient is read once.

    Args:
        parameters: tensors, or one, with gradients of any dtypes, shapes and strides, on any devices.
        norm_type: p, ``float("inf")`` for the largest absolute value.
        error_if_nonfinite: whether to look at the result on the host, which waits for the device, and raise.

    Returns:
        0-d tensor on the first gradient's device. FP32 for 16-bit gradients, where torch rounds each tensor's norm to
        16 bits, which overflows in FP16 beyond 65504; else the dtype that torch gives.

    Raises:
        TypeError: a gradient is sparse, which torch has no norm for either.
        RuntimeError: ``error_if_nonfinite`` and the norm is NaN or Inf.
    """
    return _total_norm(_gradients(_listed(parameters)), float(norm_type), error_if_nonfinite)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of ``parameters`` in place so that their norm is at most ``max_norm``.

    A drop-in for ``torch.nn.utils.clip_grad_norm_``: every gradient is multiplied by
    ``min(max_norm / (norm + 1e-6), 1)``, computed in FP32 and rounded once. Two launches for each dtype, one read to
    find the norm and one pass to apply it; nothing waits for the device. mixft's optimizers clip inside their step
    (``max_grad_norm``), which saves that pass.

    Args:
        parameters: tensors, or one, with gradients of any dtypes, shapes and strides, on any devices.
        max_norm: the largest norm that is left.
        norm_type: as in :func:`grad_norm`.
        error_if_nonfinite: as in :func:`grad_norm`; no gradient is changed then.
        foreach: None or True. torch chooses an implementation by it; the one here takes all tensors at once.

    Returns:
        The norm before clipping, as :func:`grad_norm` gives it.

    Raises:
        TypeError: a gradient is sparse, which torch has no norm for either.
        RuntimeError: ``error_if_nonfinite`` and the norm is NaN or Inf.
        ValueError: ``foreach`` is False.
    """
    if foreach is False:
        raise ValueError("foreach is False; there is one implementation, which takes all tensors at once, leave it out")
    listed = _listed(parameters)
    grads = _gradients(listed)
    if listed and not grads:
        warnings.warn(
            f"none of the {len(listed)} parameters has a gradient, so nothing was clipped; the sums of a "
            "GradAccumulator are clipped by its own clip_grad_norm_",
            stacklevel=3,
        )
    return clip_gradients_(grads, max_norm, norm_type, error_if_nonfinite)


def clip_gradients_(grads: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """:func:`clip_grad_norm_` on the gradients themselves, dense tensors."""
    norm = _total_norm(grads, float(norm_type), error_if_nonfinite)
    coefficient = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    ours, others = _sorted(grads)
    for grad in others:
        grad.mul_(coefficient.to(grad.device, non_blocking=True))
    for device, listed in ours.items():
        local = coefficient.to(device, torch.float32, non_blocking=True).reshape(())
        unscale_(listed, local, torch.zeros((), dtype=torch.float32, device=device))
    return norm


def _listed(parameters: Parameters) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    listed = list(parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4)
    return listed


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    grads = [grad for parameter in parameters if (grad := parameter.grad) is not None]
    for grad in grads:
        if grad.layout != torch.strided:
            raise TypeError(f"a gradient of shape {tuple(grad.shape)} is a {grad.layout} tensor; it must be dense")
    return grads


def _sorted(grads: list[Tensor]) -> tuple[dict[torch.device, list[Tensor]], list[Tensor]]:
    """Those that mixft's ops take, by device, and the others."""
    if taken_at_once(grads):
        return {grads[0].device: grads}, []
    ours, others = defaultdict(list), []
    for grad in grads:
        if is_taken(grad):
            ours[grad.device].append(grad)
        else:
            others.append(grad)
    return ours, others


def _total_norm(grads: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    if not grads:
        return torch.tensor(0.0)
    ours, others = _sorted(grads)
    norms = [torch.linalg.vector_norm(grad, norm_type) for grad in others]
    for listed in ours.values():
        if norm_type == 2.0:
            norms.append(grad_scalars_unchecked(listed, None, None, None).norm)
        else:
            norms += torch._foreach_norm(listed, norm_type, dtype=torch.float32)
    home = grads[0].device
    norms = [norm.to(home, non_blocking=home.type != "cpu") for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {total.item()}, so they cannot be clipped; "
            f"error_if_nonfinite=False scales them by it all the same"
        )
    return total
