"""``mixft.ops.accumulate_`` against FP64 and against torch's own FP32 sum."""

import pytest
import torch
from conftest import assert_within_budget

from mixft.ops import accumulate_

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [0, 1, 17, 66, 1000, 4097, 16385]
LARGE = 300_001  # beyond one piece of the CPU routine


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def run(grads, buffers, device, factor=None, **options):
    found_inf = scalar(0.0, device)
    nonfinite = torch.zeros(len(grads), dtype=torch.int64, device=device)
    inv_scale = None if factor is None else scalar(factor, device)
    accumulate_(grads, buffers, found_inf=found_inf, nonfinite=nonfinite, inv_scale=inv_scale, **options)
    return found_inf.item(), nonfinite.tolist()


@pytest.mark.parametrize("factor", [None, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_match_fp64(device, dtype, factor):
    grads = [torch.randn(size).to(device, dtype) for size in SIZES]
    buffers = [torch.randn(size, device=device) for size in SIZES]
    exact = [b.double() + g.double() * (factor or 1.0) for g, b in zip(grads, buffers, strict=True)]
    theirs = [b + g.float() * (factor or 1.0) for g, b in zip(grads, buffers, strict=True)]
    kept = [grad.clone() for grad in grads]
    assert run(grads, buffers, device, factor) == (0.0, [0] * len(SIZES))
    for buffer, expected, reference in zip(buffers, exact, theirs, strict=True):
        assert_within_budget(buffer, expected, reference, epsilon=1e-7)
    assert all(map(torch.equal, grads, kept))


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_overwriting_and_clearing(device, overwrite, clear):
    grads = [torch.randn(size, device=device).half() for size in (1000, 17)]
    # Whatever a buffer held before is gone, NaN too.
    buffers = [torch.full((size,), float("nan") if overwrite else 2.0, device=device) for size in (1000, 17)]
    expected = [grad.float() * 0.5 + (0.0 if overwrite else 2.0) for grad in grads]
    kept = [torch.zeros_like(grad) if clear else grad.clone() for grad in grads]
    assert run(grads, buffers, device, 0.5, overwrite=overwrite, clear=clear) == (0.0, [0, 0])
    assert all(map(torch.equal, buffers, expected))
    assert all(map(torch.equal, grads, kept))


@pytest.mark.parametrize("clear", [False, True])
def test_mixed_dtypes_and_layouts(device, clear):
    grads = [
        torch.randn(1001, device=device).half()[1:],
        torch.randn(33, 17, device=device).t(),
        torch.randn(2, 3, 5, 7, device=device).bfloat16().to(memory_format=torch.channels_last),
        torch.randn(40, 6, device=device)[:, ::2],
        torch.randn(0, 4, device=device),
        torch.randn((), device=device),
        torch.randn(3, 5, device=device).half(),
    ]
    buffers = [torch.ones(grad.shape, device=device) for grad in grads]
    buffers[6] = torch.ones(5, 3, device=device).t()  # laid out unlike its gradient
    expected = [1 + 0.25 * grad.float() for grad in grads]
    run(grads, buffers, device, 0.25, clear=clear)
    for buffer, total, grad in zip(buffers, expected, grads, strict=True):
        assert torch.equal(buffer, total)
        assert clear == (grad.numel() == 0 or not grad.any()) or grad.numel() == 0


def test_a_misaligned_gradient_beside_its_buffer_s_neighbours(device):
    whole = torch.full((1100,), 7.0, device=device)
    run([torch.ones(999, device=device, dtype=torch.float16)], [whole[1:1000]], device)
    assert whole[0] == 7.0
    assert (whole[1:1000] == 8.0).all()
    assert (whole[1000:] == 7.0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_elements_are_found_and_counted(device, dtype, value):
    grads = [torch.ones(size, device=device).to(dtype) for size in (17, 16385, 66)]
    grads[1][[0, 5, 16384]] = value
    buffers = [torch.zeros(grad.shape, device=device) for grad in grads]
    assert run(grads, buffers, device, 0.5) == (1.0, [0, 3, 0])
    assert (~buffers[1].isfinite()).sum() == 3


def test_counts_and_flag_grow_and_never_go_back(device):
    grads = [torch.tensor([1.0, float("inf")], device=device), torch.ones(3, device=device)]
    buffers = [torch.zeros_like(grad) for grad in grads]
    found_inf, nonfinite = scalar(0.0, device), torch.tensor([5, 6], device=device)
    for _ in range(2):
        accumulate_(grads, buffers, found_inf=found_inf, nonfinite=nonfinite)
    accumulate_([torch.ones_like(grad) for grad in grads], buffers, found_inf=found_inf, nonfinite=nonfinite)
    assert (found_inf.item(), nonfinite.tolist()) == (1.0, [7, 6])


def test_large_finite_gradients_are_no_overflow(device):
    grads = [torch.full((66,), 1e30, device=device)]
    assert run(grads, [torch.zeros(66, device=device)], device) == (0.0, [0])


def test_more_than_a_piece(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    grads, buffers = [torch.randn(LARGE).half()], [torch.ones(LARGE)]
    grads[0][-1] = float("inf")
    expected = 1 + grads[0].float() * 0.5
    assert run(grads, buffers, torch.device("cpu"), 0.5) == (1.0, [1])
    assert torch.equal(buffers[0], expected)


def test_refusals(device):
    one, counts = scalar(1.0, device), torch.zeros(1, dtype=torch.int64, device=device)
    grads, buffers = [torch.ones(2, device=device)], [torch.ones(2, device=device)]
    given = {"found_inf": one, "nonfinite": counts}
    accumulate_([], [], **given)
    with pytest.raises(ValueError, match="buffers has 2 tensors for 1 gradients"):
        accumulate_(grads, buffers * 2, **given)
    with pytest.raises(TypeError, match=r"buffers\[0\] must be torch\.float32"):
        accumulate_(grads, [buffers[0].half()], **given)
    with pytest.raises(ValueError, match=r"buffers\[0\] has shape \(3,\)"):
        accumulate_(grads, [torch.ones(3, device=device)], **given)
    with pytest.raises(ValueError, match="without gaps"):
        accumulate_(grads, [torch.ones(4, device=device)[::2]], **given)
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.float64"):
        accumulate_([grads[0].double()], buffers, **given)
    with pytest.raises(TypeError, match="inv_scale is float"):
        accumulate_(grads, buffers, inv_scale=2.0, **given)
    with pytest.raises(ValueError, match="nonfinite has shape"):
        accumulate_(grads, buffers, found_inf=one, nonfinite=counts.repeat(2))


def test_opcheck(device):
    grads = [torch.randn(17, device=device), torch.randn(66, device=device).half()]
    buffers = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
    rest = (scalar(0.0, device), torch.zeros(2, dtype=torch.int64, device=device), False, True)
    op = torch.ops.mixft.accumulate_gradients_.default
    torch.library.opcheck(op, (grads, buffers, scalar(0.5, device), *rest))
    torch.library.opcheck(op, (grads, buffers, None, *rest))
