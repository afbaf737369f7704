"""``mixft.ops.grad_scalars`` against FP64, torch's clipping, and a count of what it launches."""

from math import inf, nan, sqrt

import pytest
import torch
from conftest import EPSILON, assert_within_budget

from mixft.ops import grad_scalars, grad_stats

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [0, 1, 17, 66, 1000, 16384, 16385, 40000]


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def gradients(device, sizes=SIZES):
    return [torch.randn(size).to(dtype).to(device) for dtype in DTYPES for size in sizes]


def norm_of(grads, dtype):
    return torch.stack([grad.to(dtype).square().sum() for grad in grads]).sum().sqrt()


def assert_norm(grads):
    """Hold the norm to the error of torch's, in FP32."""
    exact, own = (norm_of(grads, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(grad_scalars(grads).norm, exact, own, EPSILON[torch.float32])


def test_norm_and_clip_coefficient(device):
    grads = gradients(device)
    kept = [grad.clone() for grad in grads]
    exact = norm_of(grads, torch.float64) / 128
    found = grad_scalars(grads, inv_scale=scalar(1 / 128, device), max_norm=1.0)
    own = norm_of(grads, torch.float32) / 128
    assert_within_budget(found.norm, exact, own, EPSILON[torch.float32])
    assert_within_budget(found.clip_coef, 1.0 / (exact + 1e-6), 1.0 / (own + 1e-6), EPSILON[torch.float32])
    assert found.found_inf.item() == 0.0
    assert found.nonfinite.tolist() == [0] * len(grads)
    assert all(map(torch.equal, grads, kept))
    assert {value.shape for value in found[:3]} == {torch.Size([])}


def test_the_coefficient_is_that_of_clip_grad_norm(device):
    grads = [torch.randn(100, device=device), torch.randn(7, 3, device=device)]
    found = grad_scalars(grads, max_norm=2.0)

    def clipped(dtype):
        params = [torch.nn.Parameter(torch.zeros_like(grad, dtype=dtype)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(params, 2.0)
        return [param.grad for param in params]

    for grad, exact, own in zip(grads, clipped(torch.float64), clipped(torch.float32), strict=True):
        assert_within_budget(grad * found.clip_coef, exact, own, EPSILON[torch.float32])


def test_a_small_norm_is_not_clipped(device):
    grads = [torch.full((4,), 0.5, device=device)]
    assert grad_scalars(grads, max_norm=1.5).clip_coef.item() == 1.0
    assert grad_scalars(grads, max_norm=inf).clip_coef.item() == 1.0
    assert grad_scalars(grads).clip_coef.item() == 1.0
    assert grad_scalars(grads).norm.item() == 1.0


@pytest.mark.parametrize(("value", "expected"), [(nan, nan), (inf, 0.0), (1e-6, 0.5)])
def test_the_coefficient_at_the_edges(device, value, expected):
    grads = [torch.tensor([value], device=device)]
    assert grad_scalars(grads, max_norm=1e-6).clip_coef.item() == pytest.approx(expected, rel=2.0**-23, nan_ok=True)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("size", SIZES[1:])
def test_nonfinite_elements_are_attributed(device, value, size):
    grads = gradients(device, [17, size])
    grads[3][-1] = value
    grads[3][0] = value
    grads[0][5] = value
    found = grad_scalars(grads)
    assert found.nonfinite.tolist() == [1, 0, 0, min(size, 2), 0, 0]
    assert found.found_inf.item() == 1.0
    grads[3][-1] = grads[3][0] = grads[0][5] = 1.0
    again = grad_scalars(grads)
    assert again.found_inf.item() == 0.0, "counts must not outlive a call"
    assert again.nonfinite.tolist() == [0] * 6


@pytest.mark.parametrize(("given", "expected"), [(0.0, 0.0), (1.0, 1.0), (3.0, 1.0)])
def test_an_earlier_finding_is_included(device, given, expected):
    assert grad_scalars([torch.ones(3, device=device)], found_inf=scalar(given, device)).found_inf.item() == expected


def test_a_norm_beyond_fp32_is_an_overflow_only_where_it_is_clipped(device):
    grads = [torch.full((17,), 1e30, device=device)]
    assert grad_scalars(grads, max_norm=1.0).found_inf.item() == 1.0
    assert grad_scalars(grads).found_inf.item() == 0.0
    assert grad_scalars(grads, max_norm=1.0).nonfinite.tolist() == [0]


def test_any_layout(device):
    grads = [
        torch.randn(1001, device=device).half()[1:],
        torch.randn(33, 17, device=device).t(),
        torch.randn(40, 6, device=device)[:, ::2],
        torch.randn(0, 4, device=device),
        torch.randn((), device=device),
    ]
    assert_norm(grads)


def test_the_same_input_gives_the_same_bits(device):
    grads = gradients(device)
    first = grad_scalars(grads).norm
    assert all(torch.equal(first, grad_scalars(grads).norm) for _ in range(3))


def test_more_tensors_than_one_block_of_the_last_program(device):
    grads = [torch.full((1,), 2.0, device=device) for _ in range(300)]
    grads[299][0] = nan
    found = grad_scalars(grads)
    assert found.nonfinite.nonzero().tolist() == [[299]]
    grads[299][0] = 2.0
    # 1200 is a sum without a rounding, and the root is the nearest number.
    assert grad_scalars(grads).norm.item() == torch.tensor(sqrt(1200)).item()


def test_more_chunks_than_programs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = pytest.importorskip("mixft.kernels.grad_scalars")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    grads = [torch.randn(16384 * 5 + 3), torch.randn(17), torch.randn(16384)]
    grads[0][16384 * 3] = inf
    assert grad_scalars(grads).nonfinite.tolist() == [1, 0, 0]
    grads[0][16384 * 3] = 0.0
    assert_norm(grads)


def test_agrees_with_the_statistics_of_every_tensor(device):
    grads = gradients(device)
    squares, _ = grad_stats(grads)
    exact = norm_of(grads, torch.float64)
    assert_within_budget(squares.sum().sqrt(), exact, norm_of(grads, torch.float32), EPSILON[torch.float32])
    assert_norm(grads)


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        ([], {}, ValueError, "grads is empty"),
        ([torch.ones(2).double()], {}, TypeError, r"grads\[0\] is torch.float64"),
        ([torch.ones(2).to_sparse()], {}, ValueError, "sparse"),
        ([torch.ones(2)], {"max_norm": 0.0}, ValueError, "max_norm is 0.0"),
        ([torch.ones(2)], {"max_norm": nan}, ValueError, "max_norm is nan"),
        ([torch.ones(2)], {"inv_scale": 2.0}, TypeError, "inv_scale is float"),
        ([torch.ones(2)], {"found_inf": torch.zeros(2)}, ValueError, "found_inf has shape"),
    ],
)
def test_refusals(grads, options, error, message):
    with pytest.raises(error, match=message):
        grad_scalars(grads, **options)


def test_opcheck(device):
    grads = [torch.randn(17, device=device), torch.randn(66, device=device).half()]
    for arguments in ((None, None, None), (scalar(0.5, device), scalar(0.0, device), 1.0)):
        torch.library.opcheck(torch.ops.mixft.gradient_scalars.default, (grads, *arguments))
