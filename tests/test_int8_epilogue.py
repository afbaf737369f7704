"""What follows an integer product on the CPU: scales, zero points and bias, over more columns than a block has."""

import pytest
import torch
from conftest import assert_within_budget

from mixft.cpu import native
from mixft.cpu.int8_epilogue import apply_int8_epilogue

SHAPES = [(1, 1), (3, 17), (0, 5), (5, 0), (2, 1023), (3, 1024), (2, 1025), (21, 2100)]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def server(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)


def operands(rows, columns):
    product = torch.randint(-(2**20), 2**20, (rows, columns), dtype=torch.int32)
    zero_point = torch.randint(-128, 128, (rows, 1), dtype=torch.int32)
    column_sum = torch.randint(-5000, 5000, (columns,), dtype=torch.int32)
    return product, (torch.rand(rows, 1) + 0.5) * 2**-12, torch.rand(columns, 1) + 0.5, zero_point, column_sum


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_zero_points", [False, True])
@pytest.mark.parametrize("one_column_scale", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_has_the_terms_of_its_row_and_column(shape, one_column_scale, has_zero_points, bias_dtype):
    product, row_scale, column_scale, zero_point, column_sum = operands(*shape)
    if one_column_scale:
        column_scale = torch.tensor([[0.75]]).expand(shape[1], 1)
    bias = None if bias_dtype is None else torch.randn(shape[1]).mul(100).to(bias_dtype)
    exact = product.double() - (zero_point * column_sum if has_zero_points else 0)
    exact = exact * row_scale.double() * column_scale.double().t() + (0 if bias is None else bias.double())
    more = (zero_point, column_sum) if has_zero_points else (None, None)
    for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = apply_int8_epilogue(product.clone(), row_scale, column_scale, bias, "none", out_dtype, *more)
        assert out.dtype == out_dtype
        assert_within_budget(out, exact, exact.to(out_dtype), 2**-22)


def test_strided_terms_are_read_where_they_lie():
    rows, columns = 5, 1100
    product, row_scale, column_scale, zero_point, column_sum = operands(rows, columns)
    bias = torch.randn(columns)
    expected = apply_int8_epilogue(
        product.clone(), row_scale, column_scale, bias, "gelu", torch.float32, zero_point, column_sum
    )

    def strided(tensor):
        apart = tensor.new_full((*tensor.shape, 3), 99)
        apart[..., 1] = tensor
        return apart[..., 1]

    terms = [strided(term) for term in (row_scale, column_scale, bias, zero_point, column_sum)]
    found = apply_int8_epilogue(product.clone(), *terms[:3], "gelu", torch.float32, *terms[3:])
    assert torch.equal(found, expected)
