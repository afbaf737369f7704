"""``mixft.ops.unscale_`` and ``grad_stats`` against FP64 and torch's own unscale."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget

from mixft.ops import grad_stats, unscale_

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [0, 1, 17, 66, 1000, 4097, 16384, 16385, 40000]


def gradients(dtype, device, sizes=SIZES, scale=1.0):
    return [(scale * torch.randn(size)).to(dtype).to(device) for size in sizes]


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def mixed_gradients(device):
    """Mixed dtypes, a misaligned view, a transpose, channels-last, a strided view and an empty tensor."""
    # The same numbers on every device.
    sizes = [(1001,), (33, 17), (2, 3, 5, 7), (40, 6), (0, 4), (), (66,)]
    shifted, turned, image, wide, empty, scalar, half = (torch.randn(size).to(device) for size in sizes)
    channels_last = image.bfloat16().to(memory_format=torch.channels_last)
    return [shifted.half()[1:], turned.t(), channels_last, wide[:, ::2], empty, scalar, half.half()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unscale_matches_fp64_and_rounds_once(device, dtype):
    grads = gradients(dtype, device)
    exact = [grad.double() / 3 for grad in grads]
    inv_scale, found_inf = scalar(1 / 3, device), scalar(0.0, device)
    reference = [grad.clone() for grad in grads]
    for grad in reference:
        torch._amp_foreach_non_finite_check_and_unscale_([grad], scalar(0.0, device), inv_scale)
    unscale_(grads, inv_scale, found_inf)
    assert found_inf.item() == 0.0
    for actual, expected, theirs in zip(grads, exact, reference, strict=True):
        assert_within_budget(actual, expected, theirs, 2.0**-24)


def test_unscale_of_mixed_dtypes_and_layouts(device):
    grads = mixed_gradients(device)
    exact = [(grad.double() * 0.25) for grad in grads]
    strides = [grad.stride() for grad in grads]
    unscale_(grads, scalar(0.25, device), scalar(0.0, device).reshape(1))
    for grad, expected, stride in zip(grads, exact, strides, strict=True):
        assert torch.equal(grad.double(), expected)
        assert grad.stride() == stride


def test_unscale_leaves_the_neighbours_of_a_view(device):
    whole = torch.full((1100,), 8.0, dtype=torch.float16, device=device)
    unscale_([whole[1:1000]], scalar(0.5, device), scalar(0.0, device))
    assert whole[0] == 8.0
    assert (whole[1:1000] == 4.0).all()
    assert (whole[1000:] == 8.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("size", "where"), [(1, 0), (1000, 0), (1000, -1), (16384, 16383), (16385, -1), (16385, 5)])
def test_a_nonfinite_element_is_found_and_counted(device, dtype, value, size, where):
    grads = gradients(dtype, device, [17, size, 66])
    grads[1][where] = value
    sum_of_squares, nonfinite = grad_stats(grads)
    assert nonfinite.tolist() == [0, 1, 0]
    assert not sum_of_squares[1].isfinite()
    assert sum_of_squares[[0, 2]].isfinite().all()
    found_inf = scalar(0.0, device)
    unscale_(grads, scalar(0.5, device), found_inf)
    assert found_inf.item() == 1.0
    unscale_([grads[0]], scalar(0.5, device), found_inf)
    assert found_inf.item() == 1.0, "found_inf must never be reset"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_overflow_by_the_multiplication_is_not_a_nonfinite_gradient(device, dtype):
    grads = [torch.full((17,), torch.finfo(dtype).max, dtype=dtype, device=device)]
    found_inf = scalar(0.0, device)
    unscale_(grads, scalar(2.0, device), found_inf)
    assert grads[0].isinf().all()
    assert found_inf.item() == 0.0


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_unscaling_counts_the_nonfinite_elements_of_every_gradient(device, factor):
    grads = mixed_gradients(device)
    grads[0][3] = float("nan")
    grads[1][::2] = float("inf")
    grads[6][:] = 60000.0  # overflows with the larger factor, and is finite before it
    counts = torch.full((len(grads),), 10, dtype=torch.int64, device=device)
    exact = [10 + (grad.numel() - grad.isfinite().sum().item()) for grad in grads]
    found_inf = scalar(0.0, device)
    unscale_(grads, scalar(factor, device), found_inf, counts)
    assert counts.tolist() == exact == [11, 10 + 9 * 33, 10, 10, 10, 10, 10]
    assert found_inf.item() == 1.0
    unscale_(grads[2:6], scalar(factor, device), found_inf, counts[2:6])
    assert counts.tolist() == exact


def test_counts_that_do_not_fit_are_refused(device):
    one, grads = scalar(1.0, device), [torch.ones(2, device=device)]
    with pytest.raises(TypeError, match="nonfinite is "):
        unscale_(grads, one, one, torch.zeros(1, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="nonfinite has shape"):
        unscale_(grads, one, one, torch.zeros(2, dtype=torch.int64, device=device))


def assert_squares(found, grads, epsilon=EPSILON[torch.float32]):
    """Hold each gradient's sum of squares to the error of torch's, in FP32."""
    for actual, grad in zip(found, grads, strict=True):
        squares = (grad.to(dtype).square().sum() for dtype in (torch.float64, torch.float32))
        assert_within_budget(actual, *squares, epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_match_fp64(device, dtype):
    grads = gradients(dtype, device, scale=3.0)
    before = [grad.clone() for grad in grads]
    sum_of_squares, nonfinite = grad_stats(grads)
    assert sum_of_squares.dtype == torch.float32
    assert nonfinite.tolist() == [0] * len(grads)
    # torch's norm of a list, which serves where nothing is compiled, has fewer digits of 16-bit tensors than its sum.
    assert_squares(sum_of_squares, grads, 8 * EPSILON[torch.float32])
    assert all(map(torch.equal, grads, before))


def test_statistics_of_mixed_dtypes_and_layouts_keep_their_order(device):
    grads = mixed_gradients(device)
    assert_squares(grad_stats(grads)[0], grads)


def test_half_squares_do_not_overflow(device):
    grads = [torch.full((1000,), 60000.0, dtype=torch.float16, device=device)]
    sum_of_squares, nonfinite = grad_stats(grads)
    assert_squares(sum_of_squares, grads)
    assert nonfinite.item() == 0


def test_an_fp32_sum_that_overflows_counts_nothing(device):
    sum_of_squares, nonfinite = grad_stats([torch.full((17,), 1e30, device=device)])
    assert sum_of_squares.isinf().all()
    assert nonfinite.item() == 0


def test_statistics_of_addresses_that_serve_other_gradients_later(device):
    memory = torch.randn(64, device=device)
    for size in (64, 17, 64):
        for dtype in DTYPES:
            grads = [memory.view(torch.uint8)[: size * dtype.itemsize].view(dtype), memory[:5]]
            grads[0].copy_(torch.randn(size, device=device))
            sum_of_squares, nonfinite = grad_stats(grads)
            assert_squares(sum_of_squares, grads)
            assert nonfinite.tolist() == [0, 0]


def test_statistics_repeat_bit_for_bit(device):
    grads = gradients(torch.float32, device)
    first = grad_stats(grads)[0]
    assert torch.equal(first, grad_stats(grads)[0])


def test_many_nonfinite_elements_are_all_counted(device):
    grad = torch.randn(40000, device=device)
    grad[::3] = float("nan")
    assert grad_stats([grad])[1].item() == len(range(0, 40000, 3))


def test_empty_lists(device):
    unscale_([], scalar(1.0, device), scalar(0.0, device))
    sum_of_squares, nonfinite = grad_stats([])
    assert sum_of_squares.shape == nonfinite.shape == (0,)


def test_a_moved_gradient_is_followed(device):
    kept = []
    for value in (1.0, 2.0, 3.0):
        grad = torch.full((100,), value, device=device)
        kept.append(grad)
        assert grad_stats([grad])[0].item() == 100 * value**2


def test_refusals(device):
    one = scalar(1.0, device)
    with pytest.raises(TypeError, match=r"grads\[1\] is torch.float64"):
        unscale_([torch.ones(2, device=device), torch.ones(2, dtype=torch.float64, device=device)], one, one)
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.complex64"):
        grad_stats([torch.ones(2, dtype=torch.complex64, device=device)])
    with pytest.raises(ValueError, match=r"grads\[0\] is torch.sparse_coo"):
        grad_stats([torch.eye(3, device=device).to_sparse()])
    with pytest.raises(TypeError, match="inv_scale is float"):
        unscale_([torch.ones(2, device=device)], 1.0, one)
    with pytest.raises(ValueError, match="found_inf has shape"):
        unscale_([torch.ones(2, device=device)], one, torch.zeros(2, device=device))


def test_opcheck(device):
    grads = [torch.randn(17, device=device), torch.randn(66, device=device).half()]
    unscale = torch.ops.mixft.unscale_gradients_.default
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    torch.library.opcheck(unscale, (grads, scalar(0.5, device), scalar(0.0, device), None))
    torch.library.opcheck(unscale, (grads, scalar(0.5, device), scalar(0.0, device), counts))
    torch.library.opcheck(torch.ops.mixft.gradient_statistics.default, (grads,))


def test_gradients_on_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"grads\[1\] is on meta and grads\[0\] on cpu; pass one device at a time"):
        grad_stats([torch.ones(3), torch.ones(3, device="meta")])
