"""Layouts of tensors for kernels that walk storage element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensor_list import TensorList


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of storage, each once, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order."""
    # A dimension of one element may carry any stride.
    return all(x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1)


def in_layout_of(reference: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` itself where it lies in storage as ``reference`` does, else a copy that does."""
    if same_layout(reference, tensor):
        return tensor
    copy = torch.empty_strided(reference.shape, reference.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def without_negation(tensors: list[Tensor]) -> list[Tensor]:
    """``tensors`` with those that are views of negated numbers, whose memory holds the other sign, as copies."""
    return [tensor.resolve_neg() for tensor in tensors] if any(map(Tensor.is_neg, tensors)) else tensors


def all_contiguous(*lists: Sequence[Tensor]) -> bool:
    return all(
        listed.contiguous if isinstance(listed, TensorList) else all(map(Tensor.is_contiguous, listed))
        for listed in lists
    )
