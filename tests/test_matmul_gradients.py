"""The products of a layer's backward that do more than multiply, against FP64, on every server."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from matmul_problems import ACTIVATIONS, HALF, operands

from mixft.ops.matmul import matmul_accumulate_, matmul_activation_backward, matmul_forward


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("want_sum", [True, False])
def test_slope_in_the_product(device, dtype, activation, want_sum):
    a, b, _ = operands(37, 24, 48, dtype, device)
    kept = torch.randn(37, 48, device=device).to(dtype)
    out, total = matmul_activation_backward(a, b, kept, activation, want_sum)

    def plain(a, b, kept):
        leaf = kept.requires_grad_()
        return torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, a @ b)[0]

    truth, own = plain(a.double(), b.double(), kept.double()), plain(a.cpu(), b.cpu(), kept.cpu())
    assert out.dtype == dtype
    assert_within_budget(out, truth, own, EPSILON[dtype])
    assert total.shape == ((48,) if want_sum else (0,))
    if want_sum:
        assert total.dtype == torch.float32
        assert_within_budget(total, truth.sum(0), own.float().sum(0), EPSILON[dtype])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(37, 24, 48), (16, 1100, 32), (0, 3, 2), (3, 0, 2)])
def test_accumulate(device, dtype, shape):
    a, b, _ = operands(*shape, dtype, device)
    out = torch.randn(shape[0], shape[2], device=device)
    truth, own = (sums + 2 * (a.to(sums) @ b.to(sums)) for sums in (out.double(), out.cpu().clone()))
    address = out.data_ptr()
    matmul_accumulate_(out, a, b)
    matmul_accumulate_(out, a.t().contiguous().t(), b)
    assert out.data_ptr() == address
    assert_within_budget(out, truth, own, EPSILON[torch.float32])


def test_opcheck_of_the_backward_s_products(device):
    a, b, _ = operands(6, 10, 8, torch.float16, device)
    kept = torch.randn(6, 8, device=device).half()
    torch.library.opcheck(matmul_activation_backward, (a, b, kept, "gelu", True))
    torch.library.opcheck(matmul_activation_backward, (a, b, kept, "silu", False))
    torch.library.opcheck(matmul_accumulate_, (torch.zeros(6, 8, device=device), a, b))
    leaves = [x.requires_grad_() for x in (a, b, torch.randn(6, 8, device=device))]
    torch.library.opcheck(matmul_forward, (*leaves[:2], None, "silu", torch.float16, True, leaves[2]))
