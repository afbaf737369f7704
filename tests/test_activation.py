"""What follows a product on the CPU, and its backward, against FP64: odd sizes, every dtype, any number of threads."""

import pytest
import torch
from conftest import EPSILON, assert_rounded_once, assert_within_budget
from matmul_problems import ACTIVATIONS

from mixft.cpu import native
from mixft.cpu.activation import finish_product
from mixft.cpu.activation_backward import activation_backward, column_sums

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
NAMED = {name: function for name, function in ACTIVATIONS.items() if name}
# Below -8 torch's GELU has no digit left, in FP64 either: it adds 1 to a number that is all but -1.
EXACT = ACTIVATIONS | {"gelu": lambda x: x / 2 * torch.erfc(-x / 2**0.5)}
SHAPES = [(0, 3), (3, 0), (1, 1), (17, 66), (3, 4097), (131, 257)]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def routines(request, monkeypatch):
    """Which of the two ways the CPU routines go."""
    if request.param == "torch":
        monkeypatch.setattr("mixft.cpu.native.available", lambda: False)


def slopes_of(activation: str, grad: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """torch's own gradient, at the operands' dtype."""
    leaf = kept.detach().requires_grad_()
    return torch.autograd.grad(NAMED[activation](leaf), leaf, grad)[0]


@pytest.mark.parametrize("activation", ["none", *NAMED])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [None, torch.float16, torch.float32])
def test_forward(shape, activation, keep):
    name = None if activation == "none" else activation
    function = ACTIVATIONS[name]
    for dtype in FLOATS:
        for out_dtype in FLOATS:
            product, residual = (5 * torch.randn(shape)).to(dtype), torch.randn(shape)
            for added in (None, residual, residual.half()):
                exact = EXACT[name](product.double()) + (0 if added is None else added.double())
                out, kept = finish_product(product.clone(), activation, out_dtype, added, keep)
                assert out.dtype == out_dtype
                if native.available():
                    own = function(product.float()) + (0 if added is None else added.float())
                    assert_rounded_once(out, exact, own)
                else:
                    # A 16-bit product's activation is rounded before the residual is added.
                    own = function(product) + (0 if added is None else added.float())
                    assert_within_budget(out, exact, own.to(out_dtype), EPSILON[torch.float32])
                assert keep is None or torch.equal(kept, product.to(keep))
                assert keep is None or kept.data_ptr() != out.data_ptr() or not out.numel()


@pytest.mark.parametrize("activation", NAMED)
def test_activations_over_their_whole_range(activation):
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([0.0, -0.0, 1e-30, -100.0, 100.0, 1e30])])
    exact = EXACT[activation](x.double())
    out, _ = finish_product(x.clone(), activation, torch.float32)
    # By magnitude: beside 1e30 any error of the others is small.
    for low, high in ((0, 1), (1, 4), (4, 32), (32, torch.inf)):
        part = (exact.abs() >= low) & (exact.abs() < high)
        assert_within_budget(out[part], exact[part], NAMED[activation](x[part]), EPSILON[torch.float32])
    slopes = slopes_of(activation, torch.ones_like(x).double(), x.double())
    own = slopes_of(activation, torch.ones_like(x), x)
    out, _ = activation_backward(torch.ones(1, len(x)), x.view(1, -1), activation, torch.float32, False)
    assert_within_budget(out[0, :-1], slopes[:-1], own[:-1], EPSILON[torch.float32])


@pytest.mark.parametrize("activation", NAMED)
def test_values_that_are_not_finite(activation):
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    out, _ = finish_product(x.clone(), activation, torch.float16)
    assert out.isnan()[0, 2]
    assert not out.isfinite()[0, 0]
    slopes, _ = activation_backward(torch.ones(1, 3), x, activation, torch.float16, False)
    assert slopes[0, :2].tolist() == [1.0, 0.0]
    assert activation == "relu" or slopes[0, 2].isnan()


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_every_tie_is_rounded_to_even_and_every_nan_stays_one(dtype):
    """Of BF16, and among these of FP16, whose spacing is 8 times as small; in lengths that are no whole vectors too."""
    upper = torch.arange(2**16) << 16
    low = torch.tensor([[0x8000], [0x7FFF], [0x8001], [0xFFFF], [0x1000], [0x3000]])
    product = (upper + low).flatten().int().view(torch.float32)
    for part in (product, product[2**16 - 29 :], *product.split(61)[1050:1060]):
        out, _ = finish_product(part.clone(), "none", dtype)
        expected = part.to(dtype)
        assert torch.equal(out.isnan(), part.isnan())
        assert torch.equal(out.nan_to_num(nan=1.0).view(torch.int16), expected.nan_to_num(nan=1.0).view(torch.int16))


@pytest.mark.parametrize("activation", NAMED)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, activation):
    for dtype in FLOATS:
        for out_dtype in FLOATS:
            grad, kept = torch.randn(shape).to(dtype), torch.randn(shape).to(out_dtype)
            exact = slopes_of(activation, grad.double(), kept.double())
            own = slopes_of(activation, grad.float(), kept.float())
            out, sums = activation_backward(grad, kept, activation, out_dtype, True)
            assert out.dtype == out_dtype
            assert_rounded_once(out, exact, own)
            if not native.available() and dtype == out_dtype:
                own = slopes_of(activation, grad, kept)  # of which the sums are those of rounded values
            assert_within_budget(sums, exact.sum(0), own.float().sum(0), EPSILON[torch.float32])
            assert activation_backward(grad, kept, activation, out_dtype, False)[1].shape == (0,)


@pytest.mark.parametrize("layout", ["transposed", "every other row", "every other column", "expanded", "misaligned"])
def test_layouts_of_the_gradient(layout):
    kept = torch.randn(37, 66).half()
    grad = {
        "transposed": lambda: torch.randn(66, 37).half().t(),
        "every other row": lambda: torch.randn(74, 66).half()[::2],
        "every other column": lambda: torch.randn(37, 132).half()[:, ::2],
        "expanded": lambda: torch.ones(1, 1).half().expand(37, 66),
        "misaligned": lambda: torch.randn(37 * 66 + 1).half()[1:].view(37, 66),
    }[layout]()
    before = grad.clone()
    exact = slopes_of("gelu", grad.double(), kept.double())
    out, sums = activation_backward(grad, kept, "gelu", torch.float16, True)
    assert out.is_contiguous()
    assert_rounded_once(out, exact, slopes_of("gelu", grad.float(), kept.float()))
    own = slopes_of("gelu", grad, kept).float()
    assert_within_budget(sums, exact.sum(0), own.sum(0), EPSILON[torch.float32])
    assert_within_budget(column_sums(grad), grad.double().sum(0), grad.float().sum(0), EPSILON[torch.float32])
    assert torch.equal(grad, before)


@pytest.mark.parametrize("rows", [0, 1, 5000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_column_sums(rows, dtype):
    x = torch.randn(rows, 1025).to(dtype)
    sums = column_sums(x)
    assert sums.dtype == torch.float32
    assert_within_budget(sums, x.double().sum(0), x.float().sum(0), EPSILON[torch.float32])


def test_the_number_of_threads_changes_no_bit(one_thread):
    grad, kept = torch.randn(700, 1100).bfloat16(), torch.randn(700, 1100).bfloat16()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        product = finish_product(kept.clone(), "gelu", torch.bfloat16)[0]
        results.append((*activation_backward(grad, kept, "silu", torch.bfloat16, True), column_sums(grad), product))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
