"""Unscaling and gradient statistics on the CPU."""

import ctypes
import functools
import math
from collections import defaultdict
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

# Up to this many elements one call for all tensors is quicker than a dot product for each.
SMALL = 1 << 14
# Long FP32 dot products lose digits; a million terms keep about five, and the parts are added apart.
PIECE = 1 << 20

# Descriptions of lists of gradients that are kept.
KEPT = 64

compiled_unscale = native.Routine("unscale_gradients", *[c_void_p] * 3, c_int64, c_float, c_void_p)
compiled_statistics = native.Routine("gradient_statistics", *[c_void_p] * 3, c_int64, *[c_void_p] * 3)


def unscale_gradients_(grads: list[Tensor], inv_scale: Tensor, found_inf: Tensor, nonfinite: Tensor | None) -> None:
    """``mixft.kernels.grad.unscale_gradients_`` on the CPU."""
    if native.available():
        counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
        described = native.addresses(grads), native.sizes(grads), native.dtypes(grads), len(grads)
        compiled_unscale(*described, inv_scale.item(), counts.data_ptr())
        if counts.any():
            found_inf.fill_(1.0)
            if nonfinite is not None:
                nonfinite += counts
        return
    found = torch.zeros_like(found_inf)
    # Where the product cannot overflow, a NaN or Inf is still there after it, and is looked for only if there is one.
    if nonfinite is not None and inv_scale.item() > 1:
        nonfinite += gradient_statistics(grads)[1]
        nonfinite = None
    by_dtype = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    for same in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, inv_scale)
    if found.item():
        found_inf.fill_(1.0)
        if nonfinite is not None:
            nonfinite += gradient_statistics(grads)[1]


def gradient_statistics(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``mixft.kernels.grad.gradient_statistics`` on the CPU."""
    if native.available():
        squares = torch.empty(len(grads), dtype=torch.float32, device="cpu")
        nonfinite = torch.empty(len(grads), dtype=torch.int64, device="cpu")
        described, blocks = describe(grads)
        partial = native.scratch(8 * blocks)
        compiled_statistics(*described, partial.data_ptr(), squares.data_ptr(), nonfinite.data_ptr())
        return squares, nonfinite
    squares = sums_of_squares(grads)
    return squares, nonfinite_counts(grads, squares)


def describe(grads: list[Tensor]) -> tuple[tuple, int]:
    """``grads`` as the first arguments of a compiled routine, and how many of native/blocks.h's blocks they have."""
    sizes, dtypes, blocks = _described(native.sizes_of(grads), native.dtypes_of(grads))
    return (native.addresses(grads), sizes, dtypes, len(grads)), blocks


@functools.lru_cache(KEPT)
def _described(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[ctypes.Array, ctypes.Array, int]:
    """The sizes, the codes of the dtypes, and how many blocks these are at most: one of each tensor is not full."""
    blocks = sum(sizes) // native.constant("gradient_block") + len(sizes)
    return native.integers(c_int64, sizes), native.dtype_codes(dtypes), blocks


def sums_of_squares(grads: list[Tensor]) -> Tensor:
    """FP32 [gradients]."""
    small = [grad for grad in grads if grad.numel() <= SMALL]
    squares = torch._foreach_norm(small, 2, dtype=torch.float32) if small else []
    if squares:
        torch._foreach_mul_(squares, squares)
    if len(small) < len(grads):
        in_order = iter(squares)
        squares = [next(in_order) if grad.numel() <= SMALL else _large_sum_of_squares(grad) for grad in grads]
    return torch.stack(squares)


def nonfinite_counts(grads: list[Tensor], squares: Tensor) -> Tensor:
    """int64 [gradients]: how many elements are NaN or Inf, given the sums of squares."""
    nonfinite = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    # A NaN or Inf cannot leave a finite sum of squares, so finite sums need no second look.
    if not math.isfinite(squares.sum().item()):
        for position, finite in enumerate(squares.isfinite().tolist()):
            if not finite:
                nonfinite[position] = grads[position].numel() - grads[position].isfinite().sum()
    return nonfinite


def _large_sum_of_squares(grad: Tensor) -> Tensor:
    # The op's gradients fill their storage, so the order of the elements does not matter here.
    flat = grad.as_strided((grad.numel(),), (1,))
    # Casting first: half squares overflow, and torch's reductions over 16-bit tensors are slow on a CPU.
    pieces = map(Tensor.float, flat.split(PIECE))
    return sum(torch.dot(piece, piece) for piece in pieces)
