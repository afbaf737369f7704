"""The compiled routines on tensors of some million elements: every block is done, by whatever thread, and once."""

import pytest
import torch

from mixft.cpu import native
from mixft.cpu.accumulate import accumulate_gradients_
from mixft.cpu.activation import finish_product
from mixft.cpu.activation_backward import column_sums
from mixft.cpu.dequantize import dequantize
from mixft.cpu.dropout import dropout
from mixft.cpu.grad import gradient_statistics, unscale_gradients_
from mixft.cpu.quantize import quantize

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="needs the compiled routines"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SIZES = (2**20 + 17, 5, 2**21 - 3)


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def grads(request) -> list[torch.Tensor]:
    return [torch.arange(size).remainder(8191).sub(4000).to(request.param) for size in SIZES]


def test_every_element_is_added(grads):
    buffers, counts = [torch.ones(size) for size in SIZES], torch.zeros(len(SIZES), dtype=torch.int64)
    accumulate_gradients_(grads, buffers, torch.tensor(0.5), torch.zeros(1), counts, False, False)
    for buffer, grad in zip(buffers, grads, strict=True):
        assert torch.equal(buffer, 1 + grad.float() / 2)


def test_every_element_is_unscaled(grads):
    expected = [grad / 4 for grad in grads]
    unscale_gradients_(grads, torch.tensor(0.25), torch.zeros(1), None)
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact)


def test_every_element_is_in_the_statistics(grads):
    squares, nonfinite = gradient_statistics(grads)
    exact = torch.stack([grad.double().square().sum() for grad in grads])
    assert ((squares - exact).abs() <= 2**-20 * exact).all()
    assert not nonfinite.any()


def test_every_nonfinite_element_is_counted_once(grads):
    """All blocks count, so that two threads that did it at a time would lose some."""
    for grad in grads:
        grad.fill_(torch.nan)
    buffers, counts = [torch.ones(size) for size in SIZES], torch.zeros(len(SIZES), dtype=torch.int64)
    accumulate_gradients_(grads, buffers, None, torch.zeros(1), counts, True, False)
    assert counts.tolist() == gradient_statistics(grads)[1].tolist() == list(SIZES)
    unscale_gradients_(grads, torch.tensor(0.25), torch.zeros(1), counts)
    assert counts.tolist() == [2 * size for size in SIZES]


def test_every_element_of_a_product_is_finished(grads):
    out, kept = finish_product(grads[0].clone(), "relu", torch.float32, grads[0], grads[0].dtype)
    assert torch.equal(out, grads[0].float().relu() + grads[0].float())
    assert torch.equal(kept, grads[0])


def test_every_row_is_in_the_column_sums(grads):
    rows = grads[2][: 2040 * 1027].view(2040, 1027)
    exact = rows.double().sum(0)
    assert ((column_sums(rows) - exact).abs() <= 2**-18 * rows.double().abs().sum(0)).all()


def test_every_element_is_dropped_by_bits_of_its_own(grads):
    ones = torch.ones_like(grads[2])
    kept = dropout(ones, 2**15, 7) / 2
    assert torch.equal(dropout(grads[2], 2**15, 7), grads[2] * 2 * kept)
    dropped = 1 - kept.float()
    parts = dropped[: 2**20].view(1024, 1024)
    # Of fair coins, neighbouring blocks and halves of the tensor agree in half of the elements.
    assert (parts.mean(1) - 0.5).abs().max() < 6 * 0.5 / 32
    assert ((parts[1:] == parts[:-1]).float().mean(1) - 0.5).abs().max() < 6 * 0.5 / 32
    assert ((dropped[: 2**20 - 3] == dropped[2**20 :]).float().mean() - 0.5).abs() < 6 * 0.5 / 1024


def test_the_least_probabilities_of_dropping_and_of_keeping(grads):
    """A 65,536th of either: of a million elements 16, or 4 more or less."""
    ones = torch.ones(2**20, dtype=grads[0].dtype)
    assert 0 < (dropout(ones, 1, 3) == 0).sum() < 28
    assert 0 < (dropout(ones, 2**16 - 1, 3) != 0).sum() < 28


@pytest.mark.parametrize("shape", [(1, SIZES[0], 1), (1, 2049, 513)])
def test_stochastic_rounding_keeps_every_integer(shape):
    """Of some million elements a few draw the most extreme noise, which is within a half."""
    x = torch.arange(shape[1] * shape[2]).remainder(255).sub(127).float().view(shape)
    x[0, 0] = 127
    values, scale, _ = quantize(x, True, torch.tensor(5))
    assert (scale == 1).all()
    assert torch.equal(values.float(), x)


@pytest.mark.parametrize("shape", [(1, SIZES[0], 1), (1025, 1, 2049), (3, 341, 1027)])
def test_every_element_is_restored(grads, shape):
    values = torch.arange(shape[0] * shape[1] * shape[2]).remainder(251).sub(125).to(torch.int8).view(shape)
    scale = torch.arange(1, shape[0] * shape[2] + 1).remainder(61).exp2().mul(2.0**-70).view(shape[0], 1, shape[2])
    zero_point = torch.arange(shape[0] * shape[2]).remainder(255).int().sub(127).view(scale.shape)
    for zero in (None, zero_point):
        exact = (values.double() - (0 if zero is None else zero)) * scale
        assert torch.equal(dequantize(values, scale, zero, grads[0].dtype), exact.to(grads[0].dtype))
