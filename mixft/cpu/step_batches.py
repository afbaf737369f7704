"""The elements of many tensors in batches whose FP32 copies stay in the cache, for the optimizer steps on torch.

A batch is a list of pieces: a small tensor whole, a part of a large one. The flat buffer of a batch holds its pieces
one after another, each in whole groups of 8-bit state, so that one call encodes or decodes all of them.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .optimizer_state import GROUP_SIZE

# Elements in a batch: large enough to hide the calls' cost, small enough for the FP32 copies to stay in the cache.
BATCH = 1 << 17


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of the tensor at ``position`` of each of a step's lists."""

    position: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, tensors: list[Tensor]) -> Tensor:
        """A view: of a whole tensor itself, else flat. Those of one parameter share a layout, so any order will do."""
        tensor = tensors[self.position]
        return tensor if self.size == tensor.numel() else self.flat(tensors)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        tensor = tensors[self.position]
        return tensor.as_strided((self.size,), (1,), tensor.storage_offset() + self.start)


class Batch:
    """Pieces of parameters of one dtype, at most ``BATCH`` elements, and of the other lists of a step likewise."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each piece in the flat buffer."""
        spans, end = [], 0
        for piece in self.pieces:
            begin, end = end, end + _whole_groups(piece.size)
            spans.append((begin, end))
        return spans

    def first(self, tensors: list[Tensor]) -> Tensor:
        return tensors[self.pieces[0].position]

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """The pieces of one list; none of an empty one."""
        return [piece.of(tensors) for piece in self.pieces] if tensors else []

    def of_scales(self, scales: list[Tensor]) -> list[Tensor]:
        """The scales of the groups of each piece."""
        return [scales[position][start // GROUP_SIZE : -(-stop // GROUP_SIZE)] for position, start, stop in self.pieces]

    def parts(self, flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        """Views of the flat buffer, each in the shape and strides of the piece of ``tensors`` that it is for."""
        return [
            flat.as_strided(piece.shape, piece.stride(), flat.storage_offset() + begin)
            for piece, (begin, _) in zip(self.of(tensors), self.spans, strict=True)
        ]

    def gather(self, tensors: list[Tensor]) -> Tensor | None:
        """The pieces in a flat buffer, which is a view of a single one where that can be; None of an empty list."""
        if not tensors:
            return None
        if self._lies_flat:
            return self.pieces[0].flat(tensors)
        flat = torch.zeros(self.spans[-1][1], dtype=self.first(tensors).dtype, device="cpu")
        torch._foreach_copy_(self.parts(flat, tensors), self.of(tensors))
        return flat

    def scatter(self, flat: Tensor, tensors: list[Tensor]) -> None:
        """Write back what :meth:`gather` gave."""
        if not self._lies_flat:
            torch._foreach_copy_(self.of(tensors), self.parts(flat, tensors))

    @property
    def _lies_flat(self) -> bool:
        return len(self.pieces) == 1 and self.pieces[0].size % GROUP_SIZE == 0


def batches(params: list[Tensor]) -> Iterator[Batch]:
    """Batches that cover every element of ``params``."""
    pieces, room = [], BATCH
    for position, param in enumerate(params):
        size = param.numel()
        if pieces and param.dtype != params[pieces[0].position].dtype:
            yield Batch(pieces)
            pieces, room = [], BATCH
        # Equal pieces of whole groups: no batch has a small rest of a large tensor for itself.
        length = _whole_groups(-(-size // -(-size // BATCH))) if size else 1
        for start in range(0, size, length):
            stop = min(start + length, size)
            if stop - start > room:
                yield Batch(pieces)
                pieces, room = [], BATCH
            pieces.append(Piece(position, start, stop))
            room -= stop - start
    if pieces:
        yield Batch(pieces)


def _whole_groups(size: int) -> int:
    return -(-size // GROUP_SIZE) * GROUP_SIZE
