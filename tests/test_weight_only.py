"""The compiled product of few rows of floats with an int8 weight."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_budget

from mixft.cpu import int8_matmul, native
from mixft.ops import weight_only_matmul

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="needs the compiled routines"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SHAPES = [(1, 1, 1), (2, 7, 3), (3, 40, 33), (4, 66, 5), (5, 1001, 70), (11, 17, 31), (16, 128, 64)]


@pytest.fixture(autouse=True)
def on_the_cpu_in_fp32(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(int8_matmul, "FEW_ROWS", 16)


def operands(shape, dtype=torch.float32):
    M, K, N = shape
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return torch.randn(M, K).to(dtype), weight, torch.rand(N, 1) / 100, torch.randn(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, activation, dtype):
    x, weight, scale, bias = operands(shape, dtype)
    activate = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    for shift in (None, bias, bias.to(dtype)):
        exact = x.double() @ (weight.double() * scale.double()).t() + (0 if shift is None else shift.double())
        found = weight_only_matmul(x, weight, scale, shift, activation)
        assert found.dtype == dtype
        assert_within_budget(found, activate(exact), activate(exact).to(dtype), 2**-20)


def test_what_was_left_in_the_scratch_memory_does_not_matter():
    x, weight, scale, bias = operands((3, 41, 20))
    native.scratch(4096).view(torch.float32).fill_(torch.nan)
    assert weight_only_matmul(x, weight, scale, bias).isfinite().all()


def test_strides_and_one_scale_for_all():
    x, weight, scale, bias = operands((6, 50, 20))
    expected = weight_only_matmul(x, weight, scale[:1].expand(20, 1).clone(), bias)
    for twin in (x.t().contiguous().t(), torch.stack([x, x], 2)[:, :, 1]):
        assert torch.equal(weight_only_matmul(twin, weight, scale[:1], bias.repeat_interleave(2)[::2]), expected)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.int8)[1:].view(weight.shape).copy_(weight)
    assert torch.equal(weight_only_matmul(x, shifted, scale[:1], bias), expected)


def test_nan_and_infinity_stay_in_their_rows():
    x, weight, scale, bias = operands((6, 50, 20))
    clean = weight_only_matmul(x, weight, scale, bias, "relu")
    x[1, 3], x[4, 49] = torch.nan, torch.inf
    weight[0, 49] = 0
    found = weight_only_matmul(x, weight, scale, bias, "relu")
    assert found[1].isnan().all()
    assert found[4, 0].isnan()
    assert torch.equal(found[[0, 2, 3, 5], 1:], clean[[0, 2, 3, 5], 1:])


def test_the_bits_depend_neither_on_the_threads_nor_on_the_rows_beside(one_thread):
    x, weight, scale, bias = operands((15, 600, 70))
    alone = weight_only_matmul(x, weight, scale, bias)
    for row in range(15):
        assert torch.equal(weight_only_matmul(x[row : row + 1], weight, scale, bias), alone[row : row + 1])
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(weight_only_matmul(x, weight, scale, bias), alone)
