"""GELU as a module: torch's values and slopes, compiled or not, and torch's own elsewhere."""

import pytest
import torch
from conftest import assert_within_budget
from torch.fx.experimental.proxy_tensor import make_fx

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
    leaf, across = torch.randn(3, 4, 10, requires_grad=True), torch.randn(10, 3, 4).permute(2, 1, 0)
    found, expected = (
        torch.autograd.grad(function(leaf.transpose(0, 1)), leaf, across)[0] for function in (GELU(), torch.nn.GELU())
    )
    torch.testing.assert_close(found, expected)
    double = torch.randn(5, dtype=torch.float64)
    assert torch.equal(GELU()(double), torch.nn.functional.gelu(double))
    compiled = torch.compile(GELU(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.nn.functional.gelu(x))


def test_transforms_and_modes_see_torchs_own():
    x = torch.randn(3, 10)
    torch.testing.assert_close(torch.func.vmap(GELU())(x), torch.nn.functional.gelu(x))
    slopes = torch.func.grad(lambda x: GELU()(x).sum())(x)
    torch.testing.assert_close(slopes, torch.func.grad(lambda x: torch.nn.functional.gelu(x).sum())(x))
    traced = make_fx(GELU())(x)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [torch.ops.aten.gelu.default]

    class Own(torch.Tensor):
        pass

    assert type(GELU()(x.as_subclass(Own))) is Own


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_second_derivatives_are_torchs(approximate):
    x = torch.randn(6, 10, dtype=torch.float32, requires_grad=True)
    results = []
    for module, leaf in ((GELU, x), (torch.nn.GELU, x), (torch.nn.GELU, x.detach().double().requires_grad_())):
        y = module(approximate)(leaf.t()).square().sum()
        (slope,) = torch.autograd.grad(y, leaf, create_graph=True)
        results.append(torch.autograd.grad(y + slope.square().sum(), leaf)[0])
    assert_within_budget(results[0], results[2], results[1], 2**-18)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'; it is 'erf'"):
        GELU("erf")
