"""Unscaling and gradient statistics on the CPU."""

from collections import defaultdict

import torch
from torch import Tensor

# Up to this many elements one call for all tensors is quicker than a dot product for each.
SMALL = 1 << 14
# Long FP32 dot products lose digits; a million terms keep about five, and the parts are added apart.
PIECE = 1 << 20


def unscale_gradients_(grads: list[Tensor], inv_scale: Tensor, found_inf: Tensor, nonfinite: Tensor | None) -> None:
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
    sum_of_squares = torch.zeros(len(grads), dtype=torch.float32, device="cpu")
    sizes = [grad.numel() for grad in grads]
    small = [position for position, size in enumerate(sizes) if size <= SMALL]
    if small:
        norms = torch._foreach_norm([grads[position] for position in small], 2, dtype=torch.float32)
        sum_of_squares[small] = torch.stack(norms).square_()
    large = [position for position, size in enumerate(sizes) if size > SMALL]
    if large:
        sum_of_squares[large] = torch.stack([_large_sum_of_squares(grads[position]) for position in large])
    nonfinite = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    # A NaN or Inf cannot leave a finite sum of squares, so finite sums need no second look.
    for position, finite in enumerate(sum_of_squares.isfinite().tolist()):
        if not finite:
            nonfinite[position] = grads[position].numel() - grads[position].isfinite().sum()
    return sum_of_squares, nonfinite


def _large_sum_of_squares(grad: Tensor) -> Tensor:
    # The op's gradients fill their storage, so the order of the elements does not matter here.
    flat = grad.as_strided((grad.numel(),), (1,))
    # Casting first: half squares overflow, and torch's reductions over 16-bit tensors are slow on a CPU.
    pieces = map(Tensor.float, flat.split(PIECE))
    return sum(torch.dot(piece, piece) for piece in pieces)
