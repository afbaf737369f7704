"""Dropout: its probability, its scale, its gradient, and where it is torch's own."""

import pytest
import torch
from torch import nn

from mixft.cpu import native
from mixft.nn import Dropout


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def server(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 2**-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_share_and_scale(p, dtype):
    x = torch.ones(1000, 1001, dtype=dtype)
    y = Dropout(p)(x)
    assert y.dtype == dtype
    kept = y != 0
    # Five standard deviations of a binomial share, and the rounding of p to 16 bits.
    bound = 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17
    assert abs((~kept).double().mean().item() - p) <= bound
    dropped = round(p * 2**16)
    scale = torch.tensor(2**16 / (2**16 - dropped)).to(dtype)
    assert (y[kept] == scale).all()


def test_lanes_are_independent():
    dropped = (Dropout(0.5)(torch.ones(4096, 64)) == 0).double().view(-1, 4) - 0.5
    correlation = (dropped.t() @ dropped) / (0.25 * dropped.shape[0])
    assert (correlation - torch.eye(4)).abs().max() < 5 / dropped.shape[0] ** 0.5
    following = (dropped[1:] * dropped[:-1]).mean(0) / 0.25
    assert following.abs().max() < 5 / dropped.shape[0] ** 0.5


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (2, 9)])
def test_gradient_is_the_mask(shape):
    x = torch.randn(shape, requires_grad=True)
    view = x.t() if x.dim() == 2 else x
    y = Dropout(0.3)(view)
    y.sum().backward()
    grad = x.grad.t() if x.dim() == 2 else x.grad
    assert torch.equal(y, view.detach() * grad)


def test_second_derivative():
    x = torch.randn(40, dtype=torch.float32, requires_grad=True)
    y = Dropout(0.5)(x)
    mask = (y / x).detach()
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach() * mask**3)


def test_the_number_of_threads_changes_nothing(one_thread):
    x = torch.ones(100_003)
    torch.manual_seed(3)
    first = Dropout(0.4)(x)
    torch.set_num_threads(2)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.4)(x), first)


def test_the_seed_decides():
    layer, x = Dropout(0.4), torch.ones(777)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_evaluation_extremes_and_in_place_are_torchs():
    x = torch.randn(50)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(50))
    y = x.clone()
    assert Dropout(0.5, inplace=True)(y) is y
    assert torch.equal(Dropout(0.5)(torch.full((64,), torch.nan)).isnan(), torch.ones(64, dtype=torch.bool))


def test_from_dropout_and_bad_input():
    layer = Dropout.from_dropout(nn.Dropout(0.2).eval())
    assert isinstance(layer, nn.Dropout)
    assert (layer.p, layer.training) == (0.2, False)
    with pytest.raises(TypeError, match="it is a Linear"):
        Dropout.from_dropout(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"1\.5"):
        Dropout(1.5)


def test_compiles_without_a_graph_break():
    layer = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    y = layer(torch.ones(1001, requires_grad=True))
    assert set(y.detach().unique().tolist()) == {0.0, 2.0}
