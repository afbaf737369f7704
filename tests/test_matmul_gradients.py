"""The products of a layer's backward that do more than multiply, against FP64, on every server."""

import pytest
import torch
from conftest import error
from matmul_problems import ACTIVATIONS, HALF, operands

from mixft.ops.matmul import matmul_accumulate_, matmul_activation_backward, matmul_forward


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("want_sum", [True, False])
def test_slope_in_the_product(device, dtype, activation, want_sum):
    a, b, _ = operands(37, 24, 48, dtype, device)
    kept = torch.randn(37, 48, device=device).to(dtype)
    out, total = matmul_activation_backward(a, b, kept, activation, want_sum)
    leaf = kept.double().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, a.double() @ b.double())
    assert out.dtype == dtype
    # Half a unit in the last place, or torch's one and a half where it rounds the product first.
    assert error(out, truth) <= 1.5 * torch.finfo(dtype).eps * truth.abs().max().item() + 1e-5
    assert total.shape == ((48,) if want_sum else (0,))
    if want_sum:
        assert total.dtype == torch.float32
        assert error(total, truth.sum(0)) <= 20 * torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(37, 24, 48), (16, 1100, 32), (0, 3, 2), (3, 0, 2)])
def test_accumulate(device, dtype, shape):
    a, b, _ = operands(*shape, dtype, device)
    out = torch.randn(shape[0], shape[2], device=device)
    truth = out.double() + 2 * (a.double() @ b.double())
    address = out.data_ptr()
    matmul_accumulate_(out, a, b)
    matmul_accumulate_(out, a.t().contiguous().t(), b)
    assert out.data_ptr() == address
    assert error(out, truth) < 2e-5


def test_opcheck_of_the_backward_s_products(device):
    a, b, _ = operands(6, 10, 8, torch.float16, device)
    kept = torch.randn(6, 8, device=device).half()
    torch.library.opcheck(matmul_activation_backward, (a, b, kept, "gelu", True))
    torch.library.opcheck(matmul_activation_backward, (a, b, kept, "silu", False))
    torch.library.opcheck(matmul_accumulate_, (torch.zeros(6, 8, device=device), a, b))
    leaves = [x.requires_grad_() for x in (a, b, torch.randn(6, 8, device=device))]
    torch.library.opcheck(matmul_forward, (*leaves[:2], None, "silu", torch.float16, True, leaves[2]))
