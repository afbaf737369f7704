"""Unscaling and gradient statistics on the CPU."""

from collections import defaultdict

import torch
from torch import Tensor

# Long FP32 dot products lose digits; a million terms keeps about five, and the parts are added in pairs.
PIECE = 1 << 20


def unscale_gradients_(grads: list[Tensor], inv_scale: Tensor, found_inf: Tensor) -> None:
    by_dtype = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    for same in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, found_inf, inv_scale)


def gradient_statistics(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    pieces, owners = [], []
    for position, grad in enumerate(grads):
        # The op's gradients fill their storage, so the order of the elements does not matter here.
        flat = grad.as_strided((grad.numel(),), (1,))
        for piece in flat.split(PIECE):
            # Casting first: half squares overflow, and torch's reductions over 16-bit tensors are slow on a CPU.
            wide = piece.float()
            pieces.append(torch.dot(wide, wide))
            owners.append(position)
    sum_of_squares = torch.zeros(len(grads)).index_add_(0, torch.tensor(owners), torch.stack(pieces))
    nonfinite = torch.zeros(len(grads), dtype=torch.int64)
    # A NaN or Inf cannot leave a finite sum of squares, so finite sums need no second look.
    for position in (~sum_of_squares.isfinite()).nonzero()[:, 0].tolist():
        nonfinite[position] = grads[position].numel() - grads[position].isfinite().sum()
    return sum_of_squares, nonfinite
