"""The compiled product of many rows of floats, three bytes of each, with an int8 weight."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_budget

from mixft.cpu import int8_layer, int8_matmul, native
from mixft.cpu.int8_matmul import _many_rows
from mixft.ops import weight_only_matmul

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="needs the compiled routines"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SHAPES = [(1, 1, 1), (7, 40, 33), (12, 64, 32), (13, 1001, 70), (30, 130, 5), (75, 1001, 70)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def operands(shape, dtype=torch.float32):
    M, K, N = shape
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return torch.randn(M, K).to(dtype), weight, torch.rand(N, 1) / 100, torch.randn(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, activation, dtype):
    x, weight, scale, bias = operands(shape, dtype)
    for shift in (None, bias, bias.to(dtype)):
        exact = x.double() @ (weight.double() * scale.double()).t() + (0 if shift is None else shift.double())
        exact = F.gelu(exact) if activation == "gelu" else exact
        found = _many_rows(x, weight, scale, shift, activation, dtype)
        assert found.dtype == dtype
        assert_within_budget(found, exact, exact.to(dtype), 2**-20)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-36, 1e-3, 1.0, 1e30, 3.4e38])
def test_every_element_to_within_a_part_of_its_rows_largest(magnitude):
    """An identity as the weight shows what is left of each; magnitudes below 2^-123 are zero."""
    x = torch.cat([torch.linspace(-1, 1, 333), torch.randn(16 * 333).clamp(-1, 1)]).view(17, 333) * magnitude
    x[1] = torch.linspace(0.99, 1, 333) * magnitude
    found = _many_rows(x, torch.eye(333).to(torch.int8), torch.ones(333, 1), None, "none", torch.float32)
    bound = (2**-22 * x.abs().amax(1, keepdim=True).double()).clamp(min=2.0**-123)
    assert ((found.double() - x.double()).abs() <= bound).all()


def test_the_largest_sums():
    x, weight = torch.full((8, 100_000), 1.0), torch.full((40, 100_000), -128, dtype=torch.int8)
    x[1::2] = -1
    found = _many_rows(x, weight, torch.ones(40, 1), None, "none", torch.float32)
    assert (found.double() - x.double() @ weight.double().t()).abs().max() <= 2**-21 * 12_800_000


def test_rows_with_nan_or_infinity_are_multiplied_in_floats():
    x, weight, scale, bias = operands((20, 50, 20))
    x[1, 3], x[4, 49] = torch.nan, torch.inf
    found = weight_only_matmul(x, weight, scale, bias)
    expected = F.linear(x, weight * scale, bias)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_the_bits_depend_neither_on_the_threads_nor_on_the_rows_beside(one_thread):
    x, weight, scale, bias = operands((40, 600, 70))
    alone = _many_rows(x, weight, scale, bias, "none", torch.float32)
    for rows in (slice(0, 1), slice(5, 30)):
        assert torch.equal(_many_rows(x[rows], weight, scale, bias, "none", torch.float32), alone[rows])
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(_many_rows(x, weight, scale, bias, "none", torch.float32), alone)


@pytest.mark.parametrize(("of_bytes", "amx", "rows"), [(True, False, 7), (True, True, 10)])
def test_who_is_served(monkeypatch, of_bytes, amx, rows):
    """Few rows are not, nor any without instructions for bytes; with AMX oneDNN has a faster product of many."""
    served = []
    monkeypatch.setattr(int8_matmul, "_multiplies_bytes", lambda: of_bytes)
    monkeypatch.setattr(int8_layer, "has_amx", lambda: amx)
    monkeypatch.setattr(int8_matmul, "_many_rows", lambda x, *rest: served.append(len(x)) or _many_rows(x, *rest))
    for count in (int8_matmul.FEW_ROWS, rows, int8_layer.AMX_ROWS):
        weight_only_matmul(*operands((count, 50, 20)))
    assert served == [rows] + [int8_layer.AMX_ROWS] * (not amx)
    served.clear()
    monkeypatch.setattr(int8_matmul, "_multiplies_bytes", lambda: False)
    weight_only_matmul(*operands((rows, 50, 20)))
    assert not served
