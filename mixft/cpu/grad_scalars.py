"""What an optimizer step needs to know of its gradients, on the CPU."""

import ctypes
import math
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .grad import describe, gradient_statistics

compiled = native.Routine("gradient_scalars", *[c_void_p] * 3, c_int64, *[c_void_p] * 7)

LARGEST_FP32 = torch.finfo(torch.float32).max


def gradient_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """``mixft.kernels.grad_scalars.gradient_scalars`` on the CPU."""
    if native.available():
        return _compiled_scalars(grads, inv_scale, found_inf, max_norm)
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


def _compiled_scalars(
    grads: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    scalars = torch.empty(3, dtype=torch.float32, device="cpu")
    nonfinite = torch.empty(len(grads), dtype=torch.int64, device="cpu")
    described, blocks = describe(grads)
    # FP64 of every block, then FP32 of every gradient.
    scratch = native.scratch(8 * blocks + 4 * len(grads))
    partial = scratch.data_ptr()
    given = native.address(inv_scale), native.address(found_inf)
    limit = None if max_norm is None else ctypes.byref(c_double(max_norm))
    compiled(*described, partial, partial + 8 * blocks, *given, limit, scalars.data_ptr(), nonfinite.data_ptr())
    return scalars, nonfinite
