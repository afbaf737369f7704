"""The int8 products against FP64: exact sums, scales, epilogues, odd sizes, strides and bad input."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_budget
from matmul_problems import ACTIVATIONS

from mixft.cpu import native
from mixft.cpu.int8_matmul import _compiled, fp32_integer_product, integer_product
from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.int8_matmul import bucket
from mixft.kernels.int8_split_k import split_count
from mixft.ops import int8_matmul, weight_only_matmul

SHAPES = [(1, 1, 1), (17, 66, 33), (3, 1000, 5), (40, 100, 130), (0, 4, 5), (3, 0, 4), (4, 5, 0)]
EPSILON = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}
# Of a long sum of 16-bit products: a GPU's matrix instructions cut it off after every few terms, and do not round it.
LONG_SUM = {"cpu": 2**-20, "cuda": 2**-18}


def int8(*shape, device):
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


def exact_product(a, b, a_scale, b_scale, bias, activation):
    product = a.double().cpu() @ b.double().cpu().t()
    scaled = product * a_scale.double().cpu().reshape(-1, 1) * b_scale.double().cpu().reshape(1, -1)
    return ACTIVATIONS[activation](scaled if bias is None else scaled + bias.double().cpu())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", EPSILON)
def test_int8_matmul_matches_fp64(device, shape, out_dtype):
    M, K, N = shape
    a, b = int8(M, K, device=device), int8(N, K, device=device)
    a_scale, b_scale = torch.rand(M, 1, device=device) / 100, torch.rand(N, 1, device=device) / 100
    bias = torch.randn(N, device=device)
    exact = exact_product(a, b, a_scale, b_scale, bias, None)
    out = int8_matmul(a, b, a_scale, b_scale, bias, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_within_budget(out, exact, exact.to(out_dtype), EPSILON[out_dtype])


@pytest.mark.skipif(not native.available(), reason="needs the compiled routines")
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 40, 33), (17, 66, 70), (75, 130, 65)])
def test_the_compiled_product(shape, by_row, affine):
    """Itself: where there is a faster one, :func:`int8_matmul` does not call it."""
    M, K, N = shape
    a, b = int8(M, K, device="cpu"), int8(K, N, device="cpu").t() if by_row else int8(N, K, device="cpu")
    a_scale, b_scale, bias = torch.rand(M, 1) / 500, torch.rand(N, 1) / 50, torch.randn(N)
    zero_point = torch.randint(-128, 128, (M, 1), dtype=torch.int32) if affine else None
    shifted = a.int() - zero_point if affine else a
    exact = exact_product(shifted, b, a_scale, b_scale, bias, "gelu")
    b_sum = b.sum(1, dtype=torch.int32) if affine else None
    out = _compiled(a, b, a_scale, b_scale, bias, "gelu", torch.float32, zero_point, b_sum)
    assert_within_budget(out, exact, exact.float(), 2**-21)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogues(device, activation, with_bias):
    a, b = int8(33, 50, device=device), int8(21, 50, device=device)
    a_scale, b_scale = torch.rand(33, device=device) / 500, torch.rand(21, device=device) / 50
    bias = torch.randn(21, device=device).half() if with_bias else None
    exact = exact_product(a, b, a_scale, b_scale, bias, activation)
    out = int8_matmul(a, b, a_scale, b_scale, bias, activation, torch.float32)
    assert_within_budget(out, exact, exact.float(), 2**-21)
    x = torch.randn(33, 50, device=device).half()
    exact = exact_product(x, b, torch.ones(33), b_scale, bias, activation)
    out = weight_only_matmul(x, b, b_scale, bias, activation, torch.float32)
    assert_within_budget(out, exact, exact.float(), 2**-20)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_scale_for_all_columns(device, shape):
    M, K, N = shape
    a, b, bias = int8(M, K, device=device), int8(N, K, device=device), torch.randn(N, device=device)
    a_scale, b_scale = torch.rand(M, device=device), torch.full((1,), 0.03, device=device)
    exact = exact_product(a, b, a_scale, b_scale, bias, None)
    out = int8_matmul(a, b, a_scale, b_scale, bias, out_dtype=torch.float32)
    assert_within_budget(out, exact, exact.float(), 2**-21)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_an_activation_is_of_the_unrounded_product(device, out_dtype):
    """Also of more elements than torch's operators convert in a buffer of their own."""
    a, b = int8(257, 9, device=device), int8(300, 9, device=device)
    a_scale, b_scale = torch.rand(257, device=device) / 100, torch.rand(300, device=device) / 10
    exact = exact_product(a, b, a_scale, b_scale, None, "gelu")
    wide = int8_matmul(a, b, a_scale, b_scale, None, "gelu", torch.float32)
    assert_within_budget(wide, exact, exact.float(), 2**-21)
    assert torch.equal(int8_matmul(a, b, a_scale, b_scale, None, "gelu", out_dtype), wide.to(out_dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_row", [True, False])
def test_zero_points(device, shape, per_row):
    M, K, N = shape
    a, b = int8(M, K, device=device), int8(N, K, device=device)
    a_scale, b_scale, bias = torch.rand(M, device=device), torch.rand(N, device=device), torch.randn(N, device=device)
    zero_point = int8(M if per_row else 1, device=device).int()
    shifted = a.double().cpu() - zero_point.double().cpu().reshape(-1, 1)
    exact = exact_product(shifted, b, a_scale, b_scale, bias, "gelu")
    arguments = a, b, a_scale, b_scale, bias, "gelu", torch.float32
    out = int8_matmul(*arguments, a_zero_point=zero_point)
    assert_within_budget(out, exact, exact.float(), 2**-21)
    assert torch.equal(int8_matmul(*arguments, a_zero_point=zero_point, b_sum=b.sum(1, dtype=torch.int32)), out)


def test_zero_points_are_exact_where_the_sum_without_them_is_beyond_fp32(device):
    a = torch.full((2, 2080), 127, dtype=torch.int8, device=device)
    b = torch.full((3, 2080), 127, dtype=torch.int8, device=device)
    a[0, 5] = 126
    one, zero_point = torch.ones(1, device=device), torch.full((1,), 127, dtype=torch.int32, device=device)
    out = int8_matmul(a, b, one, one, out_dtype=torch.float32, a_zero_point=zero_point)
    assert out.tolist() == [[-127.0] * 3, [0.0] * 3]


def test_sums_beyond_fp32_are_exact_before_the_scale(device):
    a = torch.full((2, 2080), -128, dtype=torch.int8, device=device)
    b = torch.full((3, 2080), -128, dtype=torch.int8, device=device)
    a[:, 0], b[:, 0] = 1, 1
    one = torch.ones(1, device=device)
    out = int8_matmul(a, b, one, one, out_dtype=torch.float32)
    assert torch.equal(out.cpu(), torch.full((2, 3), 2079 * 128 * 128 + 1).float())


@pytest.mark.parametrize("shape", [(1, 2080, 37), (17, 1500, 5), (3, 513, 70)])
def test_sums_split_among_programs(device, shape):
    M, K, N = shape
    a, b = int8(M, K, device=device), int8(N, K, device=device)
    a_scale, b_scale, bias = torch.rand(M, device=device), torch.rand(N, device=device), torch.randn(N, device=device)
    zero_point = int8(M, device=device).int()
    shifted = a.double().cpu() - zero_point.double().cpu()[:, None]
    exact = exact_product(shifted, b, a_scale, b_scale, bias, "silu")
    arguments = a, b, a_scale, b_scale, bias, "silu", torch.float32
    out = int8_matmul(*arguments, a_zero_point=zero_point)
    assert_within_budget(out, exact, exact.float(), 2**-21)
    assert torch.equal(int8_matmul(*arguments, a_zero_point=zero_point), out)
    x = torch.randn(M, K, device=device).half()
    exact = exact_product(x, b, torch.ones(M), b_scale, bias, "relu")
    out = weight_only_matmul(x, b, b_scale, bias, "relu", torch.float32)
    assert_within_budget(out, exact, exact.float(), LONG_SUM[device.type])


@pytest.mark.parametrize(
    ("tiles", "blocks", "parts"), [(132, 16, 1), (131, 16, 2), (32, 16, 5), (1, 16, 8), (1, 3, 1), (1, 1000, 132)]
)
def test_the_parts_of_a_sum(tiles, blocks, parts):
    assert split_count(tiles, blocks, 132) == parts


def test_non_contiguous_and_misaligned_operands(device):
    a = int8(70, 37, device=device).t()
    misaligned = int8(23 * 70 + 3, device=device)[3:].view(23, 70)
    a_scale = torch.rand(37, 4, device=device)[:, 1]
    b_scale = torch.rand(1, device=device)
    for b in (misaligned, misaligned.t().contiguous().t(), int8(46, 140, device=device)[::2, ::2]):
        exact = exact_product(a, b, a_scale, b_scale.expand(23), None, None)
        out = int8_matmul(a, b, a_scale, b_scale, out_dtype=torch.float32)
        assert_within_budget(out, exact, exact.float(), 2**-22)


@pytest.mark.parametrize(
    "overlapping",
    [lambda x: x[:1].expand(40, -1), lambda x: x[:, :1].expand(-1, 48), lambda x: x.flatten().unfold(0, 48, 3)[:40]],
    ids=["one row", "one column", "windows"],
)
def test_operands_whose_elements_overlap(device, overlapping):
    a, b, ones = int8(40, 48, device=device), int8(40, 48, device=device), torch.ones(40, device=device)
    for left, right in ((overlapping(a), b), (a, overlapping(b))):
        exact = exact_product(left, right, ones, ones, None, None)
        assert torch.equal(int8_matmul(left, right, ones, ones, out_dtype=torch.float32).cpu(), exact.float())
        assert torch.equal(integer_product(left.cpu(), right.cpu().t()).double(), exact)


def test_leading_dimensions_are_kept(device):
    a, b = int8(2, 3, 16, device=device), int8(5, 16, device=device)
    a_scale, b_scale = torch.rand(2, 3, 1, device=device), torch.rand(5, device=device)
    exact = exact_product(a.view(6, 16), b, a_scale, b_scale, None, None).view(2, 3, 5)
    assert_within_budget(int8_matmul(a, b, a_scale, b_scale, out_dtype=torch.float32), exact, exact.float(), 2**-22)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_only_matmul_matches_fp64(device, dtype, shape):
    M, K, N = shape
    a, b = torch.randn(M, K, device=device).to(dtype), int8(N, K, device=device)
    b_scale, bias = torch.rand(N, device=device) / 100, torch.randn(N, device=device).to(dtype)
    exact = exact_product(a, b, torch.ones(M), b_scale, bias, None)
    weight = (b.float() * b_scale[:, None]).to(dtype)
    torch_result = F.linear(a.cpu(), weight.cpu(), bias.cpu())
    out = weight_only_matmul(a, b, b_scale, bias)
    assert out.dtype == dtype
    long_sum = LONG_SUM["cuda"] if device.type == "cuda" else 0.0  # torch's result is a CPU's
    assert_within_budget(out, exact, torch_result, max(EPSILON[dtype], long_sum))


def test_weight_only_matmul_is_differentiable_in_its_activations(device):
    a = torch.randn(6, 17, device=device, requires_grad=True)
    b, b_scale = int8(9, 17, device=device), torch.rand(9, device=device) / 100
    bias = torch.randn(9, device=device, requires_grad=True)
    grad_out = torch.randn(6, 9, device=device)
    weight_only_matmul(a, b, b_scale, bias).backward(grad_out)
    exact = grad_out.double().cpu() @ (b.double().cpu() * b_scale.double().cpu()[:, None])
    assert_within_budget(a.grad, exact, exact.float(), 2**-20)
    assert_within_budget(bias.grad, grad_out.double().cpu().sum(0), grad_out.sum(0), 2**-20)
    with pytest.raises(ValueError, match="activation='gelu' cannot be differentiated"):
        weight_only_matmul(a, b, b_scale, bias, "gelu")


@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 1025, 17), (2, 3000, 2)])
def test_both_cpu_integer_products_are_exact(shape):
    M, K, N = shape
    a, b = int8(M, K, device="cpu"), int8(K, N, device="cpu")
    exact = (a.double() @ b.double()).to(torch.int32)
    assert torch.equal(integer_product(a, b), exact)
    assert torch.equal(fp32_integer_product(a, b), exact)
    assert torch.equal(integer_product(b.t(), a.t()), exact.t())


@pytest.mark.parametrize("shape", [(1, 7, 5), (6, 1, 5), (6, 7, 1), (1, 1, 5), (1, 7, 1), (6, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("strides", ["row", "column", "stepped"])
def test_integer_products_of_single_rows_and_columns_of_any_strides(shape, strides):
    """Torch leaves the stride of a dimension of size 1 open: one and the same matrix may come with any."""
    M, K, N = shape

    def laid_out(rows, columns):
        if strides == "stepped":
            return int8(rows, 3 * columns, device="cpu")[:, 1::3]
        return int8(rows, columns, device="cpu") if strides == "row" else int8(columns, rows, device="cpu").t()

    a, b = laid_out(M, K), laid_out(K, N)
    exact = (a.double() @ b.double()).to(torch.int32)
    for first in (a, a.as_strided(a.shape, (0, *a.stride()[1:])) if M == 1 else a):
        assert torch.equal(integer_product(first, b), exact)


def test_opcheck(device):
    a, b = int8(5, 32, device=device), int8(4, 32, device=device)
    a_scale, b_scale = torch.rand(5, 1, device=device), torch.rand(4, 1, device=device)
    bias = torch.randn(4, device=device)
    torch.library.opcheck(torch.ops.mixft.int8_matmul.default, (a, b, a_scale, b_scale, bias, "gelu", torch.float16))
    zero_points = torch.ones(5, 1, dtype=torch.int32, device=device), torch.ones(4, dtype=torch.int32, device=device)
    affine = (a, b, a_scale, b_scale, bias, "none", torch.float32, *zero_points)
    torch.library.opcheck(torch.ops.mixft.int8_matmul.default, affine)
    x = torch.randn(5, 32, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mixft.weight_only_matmul.default, (x, b, b_scale, bias, "none", torch.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(2, 4)}, TypeError, "a must be torch.int8; it is torch.float32"),
        ({"b": torch.ones(3, 5, dtype=torch.int8)}, ValueError, r"a has shape \(2, 4\), b \(3, 5\)"),
        ({"a_scale": torch.ones(3)}, ValueError, r"a_scale must have 1 or 2 elements; it has shape \(3,\)"),
        ({"b_scale": torch.ones(3).half()}, TypeError, "b_scale must be torch.float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(3,\); it has shape \(4,\)"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of relu, gelu"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be torch.float16 or"),
        ({"b": torch.ones(3, 4, dtype=torch.int8, device="meta")}, ValueError, "b on meta"),
        ({"a_zero_point": torch.ones(3).int()}, ValueError, r"a_zero_point must have 1 or 2 elements"),
        ({"a_zero_point": torch.ones(2)}, TypeError, "a_zero_point must be torch.int32; it is torch.float32"),
        ({"b_sum": torch.ones(3).int()}, ValueError, "b_sum serves zero points"),
        (
            {"a_zero_point": torch.ones(2).int(), "b_sum": torch.ones(4).int()},
            ValueError,
            r"b_sum must have shape \(3,",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "a": torch.ones(2, 4, dtype=torch.int8),
        "b": torch.ones(3, 4, dtype=torch.int8),
        "a_scale": torch.ones(2),
        "b_scale": torch.ones(3),
    }
    with pytest.raises(error, match=message):
        int8_matmul(**{**arguments, **change})


def test_a_strided_bias(device):
    a, b = int8(7, 32, device=device), int8(5, 32, device=device)
    a_scale, b_scale = torch.rand(7, device=device), torch.rand(5, device=device)
    for bias in (torch.randn(5, 3, device=device)[:, 1], torch.randn(1, device=device).expand(5)):
        expected = int8_matmul(a, b, a_scale, b_scale, bias.clone(), out_dtype=torch.float32)
        assert torch.equal(int8_matmul(a, b, a_scale, b_scale, bias, out_dtype=torch.float32), expected)
        x = torch.randn(7, 32, device=device).half()
        expected = weight_only_matmul(x, b, b_scale, bias.clone(), out_dtype=torch.float32)
        assert torch.equal(weight_only_matmul(x, b, b_scale, bias, out_dtype=torch.float32), expected)


def test_sums_that_could_exceed_int32_are_refused():
    a, b = torch.empty(1, 2**17, dtype=torch.int8), torch.empty(1, 2**17, dtype=torch.int8)
    with pytest.raises(ValueError, match="K must be at most 131071"):
        int8_matmul(a, b, torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="K must be at most 65793"):
        int8_matmul(a, b, torch.ones(1), torch.ones(1), a_zero_point=torch.ones(1).int())


@pytest.mark.parametrize(
    ("op", "arch", "M", "N", "activation", "name"),
    [
        ("int8_matmul", "sm_90", 32, 2**20, "none", "small"),
        ("int8_matmul", "sm_90", 33, 4096, "none", "large"),
        ("int8_matmul", "sm_90", 2048, 2048, "none", "wide"),
        ("int8_matmul", "sm_90", 2048, 2048, "gelu", "large"),
        ("int8_matmul", "sm_80", 2048, 2048, "none", "large"),
        ("weight_only_matmul", "sm_90", 2048, 2048, "none", "large"),
    ],
)
def test_the_tiles_of_a_shape(op, arch, M, N, activation, name):
    assert bucket(op, M, N, activation, ARCHITECTURES[arch]) == name
