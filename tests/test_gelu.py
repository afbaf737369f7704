"""GELU as a module: torch's values and slopes, compiled or not, and torch's own elsewhere."""

import pytest
import torch
from conftest import assert_within_budget

from mixft.cpu import native
from mixft.nn import GELU


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def server(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (3, 66), (2, 5, 1001)])
def test_against_fp64(shape, dtype, approximate):
    x = (torch.randn(shape) * 3).to(dtype)
    grad = torch.randn(shape).to(dtype)
    results = []
    for module, kind in ((GELU(approximate), dtype), (torch.nn.GELU(approximate), dtype)):
        leaf = x.detach().to(kind).requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, grad.to(kind))))
    leaf = x.double().requires_grad_()
    y = torch.nn.GELU(approximate)(leaf)
    exact = (y, *torch.autograd.grad(y, leaf, grad.double()))
    for got, theirs, want in zip(*results, exact, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, want, theirs, 2**-18)


def test_layouts_and_what_is_torchs():
    x = torch.randn(6, 10, requires_grad=True)
    y = GELU()(x.t()[1:])
    torch.testing.assert_close(y, torch.nn.functional.gelu(x.t()[1:]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad[:, 0], torch.zeros(6))
    double = torch.randn(5, dtype=torch.float64)
    assert torch.equal(GELU()(double), torch.nn.functional.gelu(double))
    compiled = torch.compile(GELU(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.nn.functional.gelu(x))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'; it is 'erf'"):
        GELU("erf")
