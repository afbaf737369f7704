"""A gradient's two int8 copies and its column sums from one call: the bits of two quantizers of their own."""

import os

import pytest
import torch
from conftest import assert_within_budget

from mixft.cpu import native
from mixft.cpu.quantize_gradient import quantize_gradient as on_cpu
from mixft.ops.quantize import _quantize
from mixft.ops.registration import server

SHAPES = [(1, 1), (17, 66), (33, 9), (70, 130), (3, 4100), (0, 5), (5, 0)]


def problem(shape, dtype, device):
    grad = torch.randn(shape, device=device).to(dtype)
    return grad, torch.rand(shape[0], device=device) + 0.01, torch.rand(shape[1], device=device) + 0.01


def quantize_gradient(*arguments):
    return server(arguments[0].device)("quantize_gradient", "quantize_gradient")(*arguments)


def check(device, grad, row_factor, column_factor, seed=None):
    """Hold one call to a quantization of the rows, one of the columns, and an FP64 sum."""
    values, scale, transposed, column_scale, sums = quantize_gradient(grad, row_factor, column_factor, seed)
    rows = _quantize(grad.unsqueeze(-1), True, seed, column_factor, True)
    columns = _quantize(grad.unsqueeze(0), True, None if seed is None else seed ^ 1, row_factor, True)
    assert values.shape == grad.shape
    assert transposed.shape == grad.t().shape
    assert torch.equal(scale, rows[1].view(-1, 1))
    assert torch.equal(column_scale, columns[1].view(-1, 1))
    finite = scale.isfinite() & column_scale.isfinite().t()
    assert torch.equal(values.where(finite, 0), rows[0].view(grad.shape).where(finite, 0))
    assert torch.equal(transposed.t().where(finite, 0), columns[0].view(grad.shape).where(finite, 0))
    assert sums.dtype == torch.float32
    exact = grad.double().sum(0).cpu()
    assert_within_budget(sums, exact, grad.sum(0, dtype=torch.float32), 2**-22)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_scales_and_sums(device, shape, dtype, stochastic):
    seed = torch.tensor(1234567890123456789, device=device) if stochastic else None
    check(device, *problem(shape, dtype, device), seed)


@pytest.mark.parametrize(
    "view", [lambda g: g.t(), lambda g: g[:, 1:], lambda g: g[:1].expand(20, -1), lambda g: g[:, ::2]]
)
def test_layouts(device, view):
    grad = view(torch.randn(20, 30, device=device))
    check(device, grad, torch.rand(grad.shape[0], device=device), torch.rand(grad.shape[1], device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_spoils_its_row_and_its_column(device, bad):
    grad, row_factor, column_factor = problem((20, 70), torch.float32, device)
    grad[3, 66] = bad
    _, scale, _, column_scale, sums = quantize_gradient(grad, row_factor, column_factor, None)
    assert (~scale.isfinite()).flatten().nonzero().tolist() == [[3]]
    assert (~column_scale.isfinite()).flatten().nonzero().tolist() == [[66]]
    if os.environ.get("TRITON_INTERPRET") != "0" or native.available():
        # Infinite for a NaN too, which a GPU's maximum would pass over; those of torch's operators are NaN.
        assert scale[3] == column_scale[66] == torch.inf
    assert (~sums.isfinite()).nonzero().tolist() == [[66]]


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_number_of_threads_changes_nothing(without_interpreter, one_thread, stochastic):
    arguments = *problem((700, 600), torch.bfloat16, "cpu"), torch.tensor(5) if stochastic else None
    expected = on_cpu(*arguments)
    torch.set_num_threads(2)
    assert all(map(torch.equal, on_cpu(*arguments), expected))
