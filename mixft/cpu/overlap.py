"""Matrices whose elements share memory, as rows of an expanded tensor or overlapping windows do, for oneDNN."""

from torch import Tensor


def without_overlap(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy where its rows or columns overlap: oneDNN refuses such strides, or multiplies by others."""
    (near, length), (far, _) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return matrix if 1 in matrix.shape or (near > 0 and far > near * (length - 1)) else matrix.contiguous()
