"""FP32 rows as unsigned bytes around 128, for products with a packed weight: one byte an element, or three."""

import functools

import torch
from torch import Tensor

from . import native
from .compiled_quantize import SMALL, quantize_into
from .quantize import SMALLEST_SCALE, UNIT_ROUNDER, no_zero_point, number, workspace

# The low byte of 1.5 * 2^23 + 128 + y is round(y) + 128, ties to even.
ROUNDER = UNIT_ROUNDER + 128


def unsigned_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 ``round(x / scale) + 128`` [M, K] and FP32 ``scale = max|x| / 127`` [M, 1] of ``x`` [M, K], any float.

    A row with a NaN or Inf gets a scale that is not finite, and any bytes.
    """
    if native.available():
        values = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
        scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device="cpu")
        quantize_into(values, scale, no_zero_point(), x.unsqueeze(-1), True, propagate=True)
        return values, scale
    x = x if x.dtype == torch.float32 else _widened(x)
    high = _magnitude(x)
    inverse = number(127.0) / high
    if x.numel() <= SMALL:
        return torch.addcmul(_rounder(x.shape[1]), x, inverse).view(torch.int32).to(torch.uint8), high / 127
    rounded = torch.addcmul(_rounder(x.shape[1]), x, inverse, out=workspace(x.numel()).view(x.shape))
    return _low_bytes(rounded), high / 127


def unsigned_limbs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Finite ``x`` [M, K] in three bytes an element: uint8 [3, M, K] and FP32 ``scale`` [M, 1], a power of two.

    ``scale * sum_i 256^-i (limbs[i] - 128)`` is ``x`` to within 2^-22 of its row's largest magnitude, and ``x`` itself
    for an FP16 or BF16 element of at least 2^-12 of that; magnitudes below 2^-123 are zero.
    """
    x = x.float()
    mantissa, exponent = torch.frexp(_magnitude(x).clamp_(min=2.0**-100))
    exponent.add_(mantissa > 0.996)  # the limbs reach to 127.498 on either side
    fixed = x.mul(_power_of_two(23 - exponent)).round_().to(torch.int32).add_(0x808080)
    limbs = torch.empty((3, *x.shape), dtype=torch.uint8, device="cpu")
    for limb in (2, 1, 0):
        limbs[limb].copy_(fixed)
        fixed.bitwise_right_shift_(8)
    return limbs, _power_of_two(exponent - 7)


def _power_of_two(exponent: Tensor) -> Tensor:
    """FP32 2^exponent of an int32 ``exponent`` in [-126, 127], by its bits."""
    return (exponent + 127).bitwise_left_shift_(23).view(torch.float32)


def _widened(x: Tensor) -> Tensor:
    return workspace(x.numel()).view(x.shape).copy_(x)


def _magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of each row, never so small that its inverse would overflow."""
    if x.numel() <= SMALL:
        high = x.abs().amax(1, keepdim=True)
    else:
        # Two reductions that read only are faster than one over the absolute values, which are written first.
        high = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_())
    return high.clamp_(min=127 * SMALLEST_SCALE)


def _low_bytes(rounded: Tensor) -> Tensor:
    return torch.empty(rounded.shape, dtype=torch.uint8, device="cpu").copy_(rounded.view(torch.int32))


@functools.lru_cache(maxsize=64)
def _rounder(columns: int) -> Tensor:
    # A full row of it: torch's addcmul is several times slower when two of its operands are broadcast along a row.
    return torch.full((1, columns), ROUNDER, dtype=torch.float32, device="cpu")
