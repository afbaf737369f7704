"""``mixft.ops.matmul`` against FP64, forward and backward, on every server."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, assert_rounded_once, assert_within_budget, error
from matmul_problems import ACTIVATIONS, HALF, exact, operands, torch_result

from mixft.ops import matmul
from mixft.ops.activation_backward import activation_backward
from mixft.ops.matmul import matmul_forward


def assert_within_fp32_budget(out, a, b, bias, activation, residual=None, epsilon=EPSILON[torch.float32]):
    """Hold an FP32 result of operands of any dtype to the error of torch's FP32 product of the same values."""
    truth, own = exact(a, b, bias, activation), torch_result(a, b, bias, activation, torch.float32)
    if residual is not None:
        truth, own = truth + residual.double(), own + residual.cpu().float()
    assert out.dtype == torch.float32
    assert_within_budget(out, truth, own, epsilon)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 66, 33), (66, 130, 70), (48, 64, 48), (16, 272, 32)])
def test_forward(device, shape, dtype, activation):
    a, b, bias = operands(*shape, dtype, device)
    out = matmul(a, b, bias, activation)
    assert out.dtype == dtype
    assert out.is_contiguous()
    own = torch_result(a, b, bias, activation)
    assert_within_budget(out, exact(a, b, bias, activation), own, EPSILON[torch.float32])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_nothing_is_rounded_before_the_one_cast(device, dtype, activation):
    a, b, bias = operands(17, 66, 33, dtype, device)
    assert_within_fp32_budget(matmul(a, b, bias, activation, torch.float32), a, b, bias, activation)
    truth, own = exact(a, b, bias, activation), torch_result(a, b, bias, activation, torch.float32)
    for out_dtype in HALF:
        out = matmul(a, b, bias, activation, out_dtype)
        assert out.dtype == out_dtype
        assert_rounded_once(out, truth, own)


def test_large_product_in_groups_of_tiles(device):
    a, b, bias = operands(1201, 32, 2064, torch.float16, device)
    for activation in (None, "relu"):
        assert_within_fp32_budget(matmul(a, b, bias, activation, torch.float32), a, b, bias, activation)


def test_many_multiplications(device):
    a, b, bias = operands(300, 256, 1024, torch.float16, device)
    assert_within_fp32_budget(matmul(a, b, bias, "gelu", torch.float32), a, b, bias, "gelu")
    a, b, bias = a.float(), b.float().t().contiguous().t(), bias.float()
    assert_within_fp32_budget(matmul(a, b, bias), a, b, bias, None)


@pytest.mark.parametrize("strides", [(4, 1), (1, 4), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_many_multiplications_of_elements_that_overlap(native_device, dtype, strides):
    a, b, bias = operands(600, 400, 512, dtype, native_device)
    windows = b.flatten()[:3000].as_strided((512, 400), strides).t()
    epsilon = 2 * EPSILON[torch.float32]  # roundings of 400 terms add up to twice those of 100
    for with_bias in (None, bias):
        out = matmul(a, windows, with_bias, out_dtype=torch.float32)
        assert_within_fp32_budget(out, a, windows, with_bias, None, epsilon=epsilon)
        truth, own = exact(a, windows, with_bias, None), torch_result(a, windows, with_bias, None)
        assert_within_budget(matmul(a, windows, with_bias), truth, own, epsilon)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep", [False, True])
def test_bf16_is_rounded_once(native_device, activation, keep):
    """As many multiplications as take a CPU to another library; kept, the activation is that of what is kept."""
    a, b, bias = operands(260, 512, 528, torch.bfloat16, native_device)
    b = b.t().contiguous().t()
    residual = torch.randn(260, 528, device=native_device).bfloat16()
    truth, total = exact(a, b, bias, activation), exact(a, b, bias, None)
    own, own_total = (torch_result(a, b, bias, name, torch.float32).to(a.device) for name in (activation, None))
    a[3, 4] = a[5, 6] = float("nan")
    sound = [row for row in range(260) if row not in (3, 5)]

    def check(out, exact, fp32_result):
        assert out[3].isnan().all()
        assert out[5].isnan().all()
        assert_rounded_once(out[sound], exact[sound], fp32_result[sound])

    out, kept = matmul_forward(a, b, bias, activation or "none", torch.bfloat16, keep, None)
    if keep:
        check(kept, total, own_total)
        rounded = torch_result(a, b, bias, activation)[sound]
        assert_within_budget(out[sound], truth[sound], rounded, EPSILON[torch.float32])
    else:
        check(out, truth, own)
    check(matmul(a, b, bias, activation, residual=residual), truth + residual.double(), own + residual.float())


LAYOUTS = {
    "transposed a": lambda a, b: (a.t().contiguous().t(), b),
    "transposed b": lambda a, b: (a, b.t().contiguous().t()),
    "both transposed": lambda a, b: (a.t().contiguous().t(), b.t().contiguous().t()),
    "misaligned": lambda a, b: (F.pad(a.flatten(), (1, 0))[1:].view(a.shape), b),
    "rows of a wider tensor": lambda a, b: (F.pad(a, (3, 4))[:, 3:-4], F.pad(b, (1, 2))[:, 1:-2]),
    "every second column": lambda a, b: (a.repeat_interleave(2, 1)[:, ::2], b.repeat_interleave(2, 1)[:, ::2]),
    "expanded": lambda a, b: (a[:1].expand(a.shape), b[:, :1].expand(b.shape)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(33, 80, 48), (19, 37, 21)])
def test_layouts(device, shape, layout):
    a, b, bias = operands(*shape, torch.float16, device)
    a, b = LAYOUTS[layout](a, b)
    assert_within_fp32_budget(matmul(a, b, bias, None, torch.float32), a, b, bias, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dimensions(device, lead, dtype):
    a, b, bias = operands(5, 33, 7, dtype, device, lead)
    for given in (a, a.transpose(0, -2), a.flatten(0, -2)[0]):
        assert_within_fp32_budget(matmul(given, b, bias, "silu", torch.float32), given, b, bias, "silu")


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_empty(device, shape, activation, dtype):
    inputs = operands(*shape, dtype, device)
    truth, own = exact(*inputs, activation), torch_result(*inputs, activation)
    assert_within_budget(matmul(*inputs, activation), truth, own, EPSILON[torch.float32])
    ones = torch.ones_like(truth)
    actual = gradients(lambda *x: matmul(*x, activation), inputs, ones)
    expected = gradients(lambda *x: exact(*x, activation), [x.double() for x in inputs], ones)
    same = gradients(lambda *x: torch_result(*x, activation), [x.cpu() for x in inputs], ones.cpu())
    for got, truth, own in zip(actual, expected, same, strict=True):
        assert_within_budget(got, truth, own, EPSILON[dtype])


def test_bias_in_fp32_and_strided(device):
    a, b, bias = operands(9, 20, 10, torch.bfloat16, device)
    wide = bias.float().repeat_interleave(2)[::2] * 1.0009765625
    for given in (wide, bias.repeat_interleave(2)[::2]):
        assert_within_fp32_budget(matmul(a, b, given, None, torch.float32), a, b, given, None)
    wide.requires_grad_()
    (grad,) = torch.autograd.grad(matmul(a, b, wide, None).sum(), wide)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, torch.full_like(grad, 9.0))


def test_autocast_around_the_op_changes_nothing(device):
    inputs = operands(17, 66, 33, torch.float16, device)
    for dtype in (torch.float16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        expected = matmul(*leaves, "gelu", torch.float32)
        expected_grads = torch.autograd.grad(expected.sum(), leaves)
        with torch.autocast(device.type, torch.bfloat16):
            out = matmul(*leaves, "gelu", torch.float32)
            grads = torch.autograd.grad(out.sum(), leaves)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, grads, expected_grads))


def test_every_element_is_written(device):
    a, b, bias = operands(67, 40, 70, torch.float16, device)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
    try:
        out, kept = matmul_forward(a, b, bias, "gelu", torch.float32, True, None)
        grad, grad_bias = activation_backward(out, kept, "gelu", torch.float16, True)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (out, kept, grad, grad_bias):
        assert tensor.isfinite().all()
    assert_within_budget(kept, exact(a, b, bias, None), torch_result(a, b, bias, None), EPSILON[torch.float32])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(device, activation):
    a, b, bias = operands(20, 34, 18, torch.float16, device)
    a[3, 4] = float("nan")
    a[5, 6] = float("inf")
    a[7, 8] = float("-inf")
    bias[2] = float("nan")
    out = matmul(a, b, bias, activation).double()
    truth = exact(a, b, bias, activation)
    assert torch.equal(out.isfinite(), truth.isfinite())
    if activation != "gelu":  # torch's own FP32 GELU of Inf is NaN on some CPUs
        assert torch.equal(out.isnan(), truth.isnan())
    assert_within_budget(out[8:], truth[8:], torch_result(a, b, bias, activation)[8:], EPSILON[torch.float32])


def gradients(function, inputs, weight):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((function(*leaves).double() * weight).sum(), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(7, 33, 21), (80, 48, 64)])
def test_backward(device, shape, dtype, activation):
    inputs = operands(*shape, dtype, device, lead=(2,))
    weight = torch.randn(2, shape[0], shape[2], device=device).to(dtype).double()
    actual = gradients(lambda a, b, bias: matmul(a, b, bias, activation), inputs, weight)
    truth = gradients(lambda a, b, bias: exact(a, b, bias, activation), [x.double() for x in inputs], weight)
    same = gradients(lambda a, b, bias: torch_result(a, b, bias, activation), [x.cpu() for x in inputs], weight.cpu())
    for got, expected, own, like in zip(actual, truth, same, inputs, strict=True):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        assert_within_budget(got, expected, own, EPSILON[dtype])


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_backward_from_an_fp32_output(device, activation):
    inputs = operands(9, 20, 30, torch.float16, device)
    weight = torch.randn(9, 30, device=device).double()
    actual = gradients(lambda a, b, bias: matmul(a, b, bias, activation, torch.float32), inputs, weight)
    truth = gradients(lambda a, b, bias: exact(a, b, bias, activation), [x.double() for x in inputs], weight)
    same = gradients(lambda a, b, bias: torch_result(a, b, bias, activation), [x.cpu() for x in inputs], weight.cpu())
    for got, expected, own in zip(actual, truth, same, strict=True):
        assert_within_budget(got, expected, own, EPSILON[torch.float16])


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_slope_far_from_zero(device, activation):
    grad = torch.ones(1, 8, device=device)
    kept = torch.tensor([[-math.inf, -6e4, -100, -70, 70, 100, 6e4, math.inf]], device=device).half()
    for dtype in (torch.float16, torch.float32):
        out, _ = activation_backward(grad, kept.to(dtype), activation, torch.float32, False)
        assert error(out, torch.tensor([[0.0] * 4 + [1.0] * 4]).double()) < 1e-20
    out, total = activation_backward(grad, torch.full_like(kept, math.nan), activation, torch.float32, True)
    assert out.isnan().all() == (activation != "relu")
    assert total.isnan().all() == (activation != "relu")


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_unit_that_relu_left_at_zero_passes_no_infinity(device, dtype):
    a, b, bias = (leaf.requires_grad_() for leaf in operands(5, 6, 7, dtype, device))
    with torch.no_grad():
        bias[:3] = -100
    out = matmul(a, b, bias, "relu")
    grad = torch.ones_like(out)
    grad[:, :3] = torch.inf
    dead, _ = activation_backward(grad, out.detach(), "relu", dtype, False)
    assert dead[:, :3].count_nonzero() == 0
    assert all(found.isfinite().all() for found in torch.autograd.grad(out, (a, b, bias), grad))


def test_bias_gradient_over_many_rows(device):
    grad = torch.randn(517, 300, device=device).half()
    kept = torch.randn(517, 300, device=device).half()
    truth = torch.ops.aten.gelu_backward(grad.double(), kept.double())
    own = torch.ops.aten.gelu_backward(grad.float(), kept.float())
    out, total = activation_backward(grad, kept, "gelu", torch.float32, True)
    assert_within_budget(out, truth, own, EPSILON[torch.float32])
    assert_within_budget(total, truth.sum(0), own.sum(0), EPSILON[torch.float32])
    strided, _ = activation_backward(grad.t().contiguous().t(), kept, "gelu", torch.float32, False)
    assert torch.equal(strided, out)


def test_gradient_keeps_the_layout_of_b(device):
    a, b, _ = operands(9, 20, 30, torch.float16, device)
    for like in (b, b.t().contiguous().t()):
        like = like.detach().requires_grad_()
        (grad,) = torch.autograd.grad(matmul(a, like).sum(), like)
        assert grad.stride() == like.stride()


def test_only_what_a_gradient_needs_is_kept(device):
    a, b, bias = operands(9, 20, 30, torch.float16, device)
    frozen = matmul(a.requires_grad_(), b, bias, "relu")
    kept_a, kept_b, kept = frozen.grad_fn.saved_tensors
    assert kept_a is None
    assert kept_b.data_ptr() == b.data_ptr()
    assert kept.data_ptr() == frozen.data_ptr()
    with torch.no_grad():
        assert not matmul(a, b, bias, "gelu").requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
def test_second_derivative(device, activation, with_residual, trained):
    """Of a gradient penalty, with respect to every operand, frozen ones aside."""
    inputs = list(operands(4, 5, 6, torch.float32, device))
    inputs[0] = inputs[0].view(2, 2, 5)
    residual = torch.randn(2, 2, 6, device=device) if with_residual else None

    def penalty_gradients(function, dtype):
        tensors = [
            x.detach().to(dtype).requires_grad_(is_trained) for x, is_trained in zip(inputs, trained, strict=True)
        ]
        leaves = [x for x in tensors if x.requires_grad]
        out = function(*tensors, None if residual is None else residual.to(dtype))
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first) + out.sum(), leaves)

    def plain(a, b, bias, residual):
        out = ACTIVATIONS[activation](a @ b + bias)
        return out if residual is None else out + residual

    actual = penalty_gradients(lambda *x: matmul(*x[:3], activation, residual=x[3]), torch.float32)
    truth, same = (penalty_gradients(plain, dtype) for dtype in (torch.float64, torch.float32))
    for got, expected, own in zip(actual, truth, same, strict=True):
        assert_within_budget(got, expected, own, 2 * EPSILON[torch.float32])  # of sums of sums


def test_second_derivative_under_a_transform(device):
    a, b, bias = operands(4, 5, 6, torch.float32, device)

    def twice(function):
        return torch.func.grad(lambda x: torch.func.grad(lambda x: function(x).sin().sum())(x).pow(2).sum())

    actual = twice(lambda x: matmul(x, b, bias, "gelu"))(a)
    expected = twice(lambda x: exact(x, b, bias, "gelu"))(a.double())
    own = twice(lambda x: F.gelu(x @ b + bias))(a)
    assert_within_budget(actual, expected, own, 2 * EPSILON[torch.float32])


def test_gradient_of_the_preactivation_itself(device):
    inputs = operands(4, 5, 6, torch.float16, device)
    ones = torch.ones(4, 6, device=device).double()

    def both(a, b, bias):
        out, kept = matmul_forward(a, b, bias, "gelu", torch.float32, True, None)
        return out.double() + 2 * kept.double()

    def kept_alone(a, b, bias):
        return matmul_forward(a, b, bias, "gelu", torch.float32, True, None)[1]

    for function, plain in (
        (both, lambda total: F.gelu(total) + 2 * total),
        (kept_alone, lambda total: total),
    ):
        actual = gradients(function, inputs, ones)
        truth = gradients(lambda *x, plain=plain: plain(exact(*x, None)), [x.double() for x in inputs], ones)
        same = gradients(lambda *x, plain=plain: plain(torch_result(*x, None)), [x.cpu() for x in inputs], ones.cpu())
        for got, expected, own in zip(actual, truth, same, strict=True):
            assert_within_budget(got, expected, own, EPSILON[torch.float16])


def test_gradient_without_the_preactivation_is_refused(device):
    a, b, _ = operands(4, 5, 6, torch.float16, device)
    out, _ = matmul_forward(a.requires_grad_(), b, None, "gelu", torch.float16, False, None)
    with pytest.raises(RuntimeError, match="keep_preactivation"):
        out.sum().backward()


def test_relu_s_output_with_a_residual_is_no_slope(native_device):
    a, b, _ = operands(4, 5, 6, torch.float16, native_device)
    residual = half(4, 6, device=native_device)
    out, _ = matmul_forward(a.requires_grad_(), b, None, "relu", torch.float16, False, residual)
    with pytest.raises(RuntimeError, match="keep_preactivation"):
        out.sum().backward()


def test_same_bits_on_every_run(device):
    a, b, bias = operands(40, 130, 50, torch.bfloat16, device)
    first, second = matmul(a, b, bias, "gelu"), matmul(a, b, bias, "gelu")
    assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_gpus_without_matrix_instructions(monkeypatch, dtype, activation):
    from mixft.kernels import architecture
    from mixft.kernels import matmul as kernels

    monkeypatch.setattr(kernels, "architecture_of", lambda device: architecture.ARCHITECTURES["sm_75"])
    a, b, bias = operands(17, 66, 33, dtype, "cpu")
    for given in (bias, None, bias.float()):
        own, own_total = (torch_result(a, b, given, name, torch.float32) for name in (activation, None))
        for out_dtype in (torch.float32, dtype):
            out, kept = kernels.matmul_forward(a, b, given, activation or "none", out_dtype, True, None)
            assert out.dtype == out_dtype
            assert_rounded_once(out, exact(a, b, given, activation), own)
            assert_rounded_once(kept, exact(a, b, given, None), own_total)
    out, kept = kernels.matmul_forward(a, b, bias, activation or "none", dtype, False, None)
    own = torch_result(a, b, bias, activation, torch.float32)
    assert_rounded_once(out, exact(a, b, bias, activation), own)
    assert kept.numel() == 0


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_opcheck(device, activation):
    a, b, bias = operands(3, 10, 6, torch.float16, device, lead=(2,))
    keep = activation == "gelu"
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    torch.library.opcheck(matmul_forward, (*leaves, activation, torch.float32, keep, None))
    torch.library.opcheck(matmul_forward, (a[0], b, None, activation, torch.float16, keep, None))
    grad = torch.randn(6, 6, device=device)
    torch.library.opcheck(activation_backward, (grad, grad.half(), activation, torch.float16, True))
    torch.library.opcheck(activation_backward, (grad.t(), grad.half(), activation, torch.float16, False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_equals_eager(device, activation):
    inputs = [x.requires_grad_() for x in operands(3, 10, 6, torch.float16, device, lead=(2,))]

    def function(a, b, bias):
        return matmul(a, b, bias, activation)

    torch.compiler.reset()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(out, function(*inputs))
    for compiled, eager in zip(
        torch.autograd.grad(out.sum(), inputs),
        torch.autograd.grad(function(*inputs).sum(), inputs),
        strict=True,
    ):
        assert torch.equal(compiled, eager)


def with_residual(a, b, bias, residual, activation):
    return exact(a, b, bias, activation) + residual.double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_residual(device, dtype, activation):
    a, b, bias = operands(17, 66, 32, dtype, device, lead=(2,))
    residual = torch.randn(2, 17, 32, device=device).to(dtype)
    for given in (residual, residual.float(), residual.transpose(0, 1).contiguous().transpose(0, 1)):
        out = matmul(a, b, bias, activation, torch.float32, residual=given)
        assert_within_fp32_budget(out, a, b, bias, activation, given)
    out = matmul(a, b, bias, activation, residual=residual)
    assert out.dtype == dtype
    own = torch_result(a, b, bias, activation, torch.float32) + residual.cpu().float()
    assert_rounded_once(out, with_residual(a, b, bias, residual, activation), own)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_backward_through_a_residual(device, activation, dtype):
    inputs = (*operands(7, 33, 21, dtype, device), torch.randn(7, 21, device=device))
    weight = torch.randn(7, 21, device=device).double()
    actual = gradients(lambda a, b, bias, r: matmul(a, b, bias, activation, residual=r), inputs, weight)
    truth = gradients(lambda *t: with_residual(*t, activation), [x.double() for x in inputs], weight)
    same = gradients(
        lambda *t: (torch_result(*t[:3], activation) + t[3]).to(dtype), [x.cpu() for x in inputs], weight.cpu()
    )
    for got, expected, own, like in zip(actual, truth, same, inputs, strict=True):
        assert got.dtype == like.dtype
        assert_within_budget(got, expected, own, EPSILON[like.dtype])
    alone = inputs[3].clone().requires_grad_()
    matmul(*inputs[:3], activation, residual=alone).sum().backward()
    assert torch.equal(alone.grad, torch.ones_like(alone))


def test_split_sum(device):
    """Few tiles and a long sum, ragged at its end."""
    for shape in ((5, 2083, 48), (40, 1200, 64)):
        a, b, bias = operands(*shape, torch.float16, device)
        assert_within_fp32_budget(matmul(a, b, bias, "gelu", torch.float32), a, b, bias, "gelu")


def half(*shape, device="cpu"):
    return torch.zeros(shape, dtype=torch.float16, device=device)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((half(2, 3), half(4, 5)), ValueError, r"\(2, 3\) and b \(4, 5\)"),
        ((half(2, 3), half(3)), ValueError, r"\(2, 3\) and b \(3,\)"),
        ((half(), half(1, 1)), ValueError, r"a has shape \(\)"),
        ((half(2, 3), half(3, 4).float()), TypeError, "float16 and b is torch.float32"),
        ((half(2, 3).double(), half(3, 4).double()), TypeError, "float64"),
        ((half(2, 3).to(torch.int8), half(3, 4).to(torch.int8)), TypeError, "int8"),
        ((half(2, 3), half(3, 4), half(3)), ValueError, r"bias has shape \(3,\); it must be \(4,\)"),
        ((half(2, 3), half(3, 4), half(1, 4)), ValueError, r"bias has shape \(1, 4\)"),
        ((half(2, 3), half(3, 4), half(4).bfloat16()), TypeError, "bias is torch.bfloat16"),
        ((half(2, 3), half(3, 4), None, "tanh"), ValueError, "activation must be None or .*gelu_tanh.* it is 'tanh'"),
        ((half(2, 3), half(3, 4), None, None, torch.int32), TypeError, "out_dtype must be .* it is torch.int32"),
        ((half(2, 3), half(3, 4, device="meta")), ValueError, "a is on cpu and b on meta"),
        ((half(2, 3), half(3, 4), half(4, device="meta")), ValueError, "bias is on meta and the operands are on cpu"),
    ],
)
def test_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        matmul(*arguments)


@pytest.mark.parametrize(
    ("residual", "kind", "message"),
    [
        (half(2, 5), ValueError, r"residual has shape \(2, 5\); it must be \(2, 4\)"),
        (half(4), ValueError, r"residual has shape \(4,\)"),
        (half(2, 4).bfloat16(), TypeError, "residual is torch.bfloat16; it must be torch.float16"),
        (half(2, 4, device="meta"), ValueError, "residual is on meta and the operands are on cpu"),
    ],
)
def test_residual_refused(residual, kind, message):
    with pytest.raises(kind, match=message):
        matmul(half(2, 3), half(3, 4), residual=residual)
