"""The batches of the optimizer step on torch's operators: every element once, no more than a buffer holds."""

import pytest
import torch

from mixft.cpu.optimizer_state import GROUP_SIZE
from mixft.cpu.step_batches import BATCH, Batch, Piece, batches

SIZES = [0, 1, 17, BATCH - 20, 40, BATCH, BATCH + 1, 3 * BATCH + 5, 7]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.bfloat16]], ids=len)
def test_every_element_is_in_one_batch(dtypes):
    params = [torch.zeros(size, dtype=dtypes[place % len(dtypes)]) for place, size in enumerate(SIZES)]
    for batch in batches(params):
        pieces = batch.of(params)
        assert 0 < sum(piece.numel() for piece in pieces) <= BATCH
        assert len({piece.dtype for piece in pieces}) == 1
        # A scale belongs to one piece only.
        assert all(piece.start % GROUP_SIZE == 0 for piece in batch.pieces)
        for piece in pieces:
            piece += 1
    assert all(param.eq(1).all() for param in params)


def test_a_large_tensor_is_cut_in_equal_parts():
    sizes = [piece.size for batch in batches([torch.zeros(2 * BATCH + 1)]) for piece in batch.pieces]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 3 * GROUP_SIZE


@pytest.mark.parametrize(
    "pieces",
    [[Piece(0, 0, 2 * GROUP_SIZE)], [Piece(0, 0, 5)], [Piece(1, GROUP_SIZE, GROUP_SIZE + 3), Piece(2, 0, 12)]],
    ids=["a view", "less than a group", "two"],
)
def test_what_is_gathered_is_scattered_back(pieces):
    tensors = [torch.randn(3 * GROUP_SIZE), torch.randn(2 * GROUP_SIZE), torch.randn(4, 3).t()]
    batch, before = Batch(pieces), [tensor.clone() for tensor in tensors]
    flat = batch.gather(tensors)
    assert flat.numel() % GROUP_SIZE == 0
    for part, piece in zip(batch.parts(flat, tensors), batch.of(tensors), strict=True):
        assert torch.equal(part, piece)
    flat += 1
    batch.scatter(flat, tensors)
    changed = [torch.zeros_like(tensor) for tensor in tensors]
    for piece in batch.of(changed):
        piece += 1
    for tensor, old, change in zip(tensors, before, changed, strict=True):
        assert torch.equal(tensor, old + change)
