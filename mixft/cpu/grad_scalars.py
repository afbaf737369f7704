"""What an optimizer step needs to know of its gradients, on the CPU."""

import torch
from torch import Tensor

from .grad import gradient_statistics


def gradient_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    sum_of_squares, nonfinite = gradient_statistics(grads)
    norm = sum_of_squares.sum().sqrt()
    if inv_scale is not None:
        norm = norm * inv_scale.reshape(())
    found = nonfinite.any() if found_inf is None else nonfinite.any() | (found_inf.reshape(()) != 0)
    clip_coef = torch.ones((), device="cpu")
    if max_norm is not None:
        # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
        found = found | ~norm.isfinite()
        clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.stack([norm, clip_coef, found.float()]), nonfinite
