"""Micro-batch gradients added to FP32 buffers on the CPU, in pieces that stay in the cache."""

import math
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

# Elements cast, checked and added at a time: a megabyte of FP32, which a core's cache holds.
PIECE = 1 << 18

compiled = native.Routine("accumulate_gradients", *[c_void_p] * 4, c_int64, c_float, c_int, c_int, c_void_p)


def accumulate_gradients_(
    grads: list[Tensor],
    buffers: list[Tensor],
    inv_scale: Tensor | None,
    found_inf: Tensor,
    nonfinite: Tensor,
    overwrite: bool,
    clear: bool,
) -> None:
    """``mixft.kernels.accumulate.accumulate_gradients_`` on the CPU."""
    factor = 1.0 if inv_scale is None else inv_scale.item()
    if native.available():
        counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
        compiled(
            native.addresses(grads),
            native.addresses(buffers),
            native.sizes(grads),
            native.dtypes(grads),
            len(grads),
            factor,
            overwrite,
            clear,
            counts.data_ptr(),
        )
        if counts.any():
            nonfinite += counts
            found_inf.fill_(1.0)
        return
    scratch = torch.empty(PIECE, dtype=torch.float32, device="cpu")
    for position, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        size = grad.numel()
        # The two lie in storage alike and without gaps, so any order of the elements will do.
        pieces = zip(_flat(grad).split(PIECE), _flat(buffer).split(PIECE), strict=True) if size else ()
        for piece, total in pieces:
            wide = piece if piece.dtype == torch.float32 else scratch[: piece.numel()].copy_(piece)
            # A NaN or Inf cannot leave a finite sum of squares, so only other sums are looked into.
            if not math.isfinite(torch.dot(wide, wide).item()):
                count = piece.numel() - piece.isfinite().sum()
                nonfinite[position] += count
                if count:
                    found_inf.fill_(1.0)
            if overwrite:
                torch.mul(wide, factor, out=total)
            else:
                total.add_(wide, alpha=factor)
            if clear:
                piece.zero_()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))
