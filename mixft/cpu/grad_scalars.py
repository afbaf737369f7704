"""What an optimizer step needs to know of its gradients, on the CPU."""

import math

import torch
from torch import Tensor

from .grad import gradient_statistics

LARGEST_FP32 = torch.finfo(torch.float32).max


def gradient_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """``mixft.kernels.grad_scalars.gradient_scalars`` on the CPU."""
    squares, nonfinite = gradient_statistics(grads)
    # From here on Python's own numbers, which cost less than tensors of one element.
    norm = math.sqrt(squares.sum().item())
    # A NaN or Inf cannot leave a finite sum of squares.
    found = (found_inf is not None and found_inf.item() != 0) or (not math.isfinite(norm) and bool(nonfinite.any()))
    if inv_scale is not None:
        norm *= inv_scale.item()
    clip_coef = 1.0
    if max_norm is not None:
        # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
        found = found or not norm <= LARGEST_FP32
        clip_coef = min(max_norm / (norm + 1e-6), 1.0)
    return torch.tensor([norm, clip_coef, found], dtype=torch.float32, device="cpu"), nonfinite
