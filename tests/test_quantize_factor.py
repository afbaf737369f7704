"""int8 quantization of a tensor times a factor for each column, in one pass."""

import pytest
import torch

from mixft.cpu.quantize import quantize as cpu_quantize
from mixft.ops.quantize import _quantize


@pytest.mark.parametrize("shape", [(5, 66, 1), (1, 300, 17), (3, 20000, 1), (1, 40000, 3), (2, 5, 4), (0, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_multiplies_before_the_range_is_taken(device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    factor = torch.rand(shape[1], device=device) + 0.01
    expected = _quantize(x.float() * factor.view(1, -1, 1), True, None)
    found = _quantize(x, True, None, factor)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    affine = _quantize(x.float() * factor.view(1, -1, 1), False, None)
    assert all(torch.equal(a, b) for a, b in zip(_quantize(x, False, None, factor), affine, strict=True))


def test_a_factor_with_non_finite_products(device):
    x = torch.tensor([1.0, torch.nan, 3e38, -2.0, 0.5], device=device).view(1, 5, 1)
    factor = torch.tensor([1.0, 1.0, 1e3, 2.0, 1.0], device=device)
    values, scale, _ = _quantize(x, True, None, factor)
    assert values.flatten().tolist() == [32, 0, 127, -127, 16]
    assert scale.item() == pytest.approx(4 / 127)


@pytest.mark.parametrize("layout", [(40, 66, 1), (1, 66, 40), (3, 66, 4), (1, 66, 1)])
def test_a_factor_in_parts_is_the_same(monkeypatch, layout):
    x, factor = torch.randn(layout), torch.rand(66)
    expected = cpu_quantize(x, True, None, factor)
    monkeypatch.setattr("mixft.cpu.quantize.WORKSPACE", 60)
    found = cpu_quantize(x, True, None, factor)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
