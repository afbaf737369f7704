"""The gradient through a frozen int8 weight in each kind of product, against FP64, and when floats take over."""

import copy
import pickle

import pytest
import torch
from conftest import assert_within_budget
from test_int8_layer import needs_compiled_layer

import mixft
from mixft.cpu.int8_input_gradient import int8_input_gradient
from mixft.nn import QuantLinear
from mixft.ops import dynamic_int8_linear, outlier_int8_linear, weight_only_matmul
from mixft.ops.int8_input_gradient import input_gradient
from mixft.ops.training_int8_linear import float_dtype

SHAPES = [(1, 1, 1), (3, 66, 17), (17, 31, 66), (13, 130, 70), (0, 8, 4), (3, 0, 2), (3, 4, 0)]
# Least signal to noise in dB of normal numbers; floats of 16 bits round the result too.
LEAST = {"int8": 34, "16bit": 45, "exact": {torch.float32: 120, torch.bfloat16: 45, torch.float16: 60}}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def operands(shape, dtype=torch.float32, device="cpu", rank=3):
    M, N, K = shape
    grad = torch.randn(M, N).to(device, dtype)
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8).to(device)
    left, right = (torch.randn(size).to(device, dtype) for size in ((M, rank), (rank, K)))
    return grad, weight, (torch.rand(N, 1) / 100 + 1e-3).to(device), left, right


def exact_gradient(grad, weight, scale, left=None, right=None):
    grad, weight, scale = (tensor.double().cpu() for tensor in (grad, weight, scale))
    out = grad @ (weight * scale)
    return out if left is None else out + left.double().cpu() @ right.double().cpu()


def signal_to_noise(found, exact):
    return 20 * torch.log10(exact.norm() / (found.double().cpu() - exact).norm())


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward", ["int8", "16bit", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_signal_to_noise_against_fp64(device, shape, backward, dtype, added):
    *tensors, left, right = operands(shape, dtype, device)
    factors = (left, right) if added else ()
    found = input_gradient(*tensors, backward, *factors)
    assert found.dtype == dtype
    assert found.shape == (shape[0], shape[2])
    exact = exact_gradient(*tensors, *factors)
    least = LEAST[backward] if backward != "exact" else LEAST[backward][dtype]
    assert not exact.any() or signal_to_noise(found, exact) > least


def test_more_terms_than_a_block_of_the_routine(device):
    *tensors, _, _ = operands((3, 2500, 20), device=device)
    assert signal_to_noise(input_gradient(*tensors, "int8"), exact_gradient(*tensors)) > LEAST["int8"]


def test_16_bit_products_are_taken_where_they_are_faster(device):
    *tensors, _, _ = operands((13, 130, 70), device=device)
    noise = signal_to_noise(input_gradient(*tensors, "16bit"), exact_gradient(*tensors))
    assert (noise < 70) == (float_dtype(tensors[0]) == torch.bfloat16)


@needs_compiled_layer
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 66, 17), (13, 4099, 40), (25, 70, 1001), (12, 128, 64)])
def test_the_compiled_product_is_exact_in_its_bytes(shape, without_interpreter):
    M, N, K = shape
    grad = torch.randint(-127, 128, (M, N)).float()
    grad[:, 0] = 127
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    grad[0], weight[:, 0] = -127, -128
    found = int8_input_gradient(grad, weight, torch.ones(N, 1), None, None)
    assert torch.equal(found, (grad.double() @ weight.double()).float())


@needs_compiled_layer
def test_the_bits_depend_neither_on_the_threads_nor_on_the_rows_beside(one_thread, without_interpreter):
    for shape in ((40, 500, 70), (3, 900, 700), (5, 30000, 40)):
        tensors = operands(shape)
        alone = int8_input_gradient(*tensors)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(int8_input_gradient(*tensors), alone)
        torch.set_num_threads(1)
        grad, weight, scale, left, right = tensors
        assert torch.equal(int8_input_gradient(grad[2:3], weight, scale, left[2:3], right), alone[2:3])


def test_strides_and_misaligned_weights(device):
    grad, weight, scale, left, right = operands((6, 50, 20), device=device)
    expected = input_gradient(grad, weight, scale, "int8", left, right)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.int8, device=device)[1:].view(weight.shape).copy_(weight)
    found = input_gradient(grad.t().contiguous().t(), shifted, scale, "int8", left.t().contiguous().t(), right)
    assert torch.equal(found, expected)
    across = weight.t().contiguous().t()
    torch.testing.assert_close(input_gradient(grad, across, scale, "int8", left, right), expected)


@pytest.mark.parametrize("amx", [False, True])
def test_scales_are_read_where_they_lie(device, monkeypatch, amx):
    """One for all rows, and every other of a tensor; also where, with AMX, the quantizer is a routine of its own."""
    monkeypatch.setattr("mixft.cpu.int8_layer.has_amx", lambda: amx)
    grad, weight, *_ = operands((40, 50, 20), device=device)
    for scale in (torch.full((1, 1), 0.01, device=device).expand(50, 1), torch.rand(50, 2, device=device)[:, 1:]):
        expected = input_gradient(grad, weight, scale.contiguous(), "int8")
        assert torch.equal(input_gradient(grad, weight, scale, "int8"), expected)


def test_nan_and_infinity_stay_in_their_rows(device):
    grad, weight, scale, *_ = operands((6, 50, 20), device=device)
    clean = input_gradient(grad, weight, scale, "int8")
    grad[1, 3], grad[4, 49] = torch.nan, torch.inf
    found = input_gradient(grad, weight, scale, "int8")
    assert not found[[1, 4]].isfinite().any()
    assert torch.equal(found[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("backward", ["int8", "16bit", "exact"])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static", "outliers"])
def test_layers_take_what_was_asked_for(native_device, mode, backward):
    threshold = {"outlier_threshold": 2.5} if mode == "outliers" else {}
    linear = torch.nn.Linear(96, 80, device=native_device)
    kind = mode if mode == "weight_only" else "dynamic"
    layer = QuantLinear.from_linear(linear, kind, backward=backward, **threshold)
    if mode == "static":
        layer.to_static(0.03, 5)
    assert f"backward={backward!r}" in repr(layer)
    x = torch.randn(2, 9, 96, device=native_device, requires_grad=True)
    grad = torch.randn(2, 9, 80, device=native_device)
    layer(x).backward(grad)
    expected = input_gradient(grad.view(18, 80), layer.weight, layer.weight_scale, backward).view(x.shape)
    assert torch.equal(x.grad, expected)
    assert_within_budget(layer.bias.grad, grad.double().cpu().sum((0, 1)), grad.sum((0, 1)), 2**-20)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.backward == backward


@pytest.mark.parametrize("backward", ["int8", "16bit"])
def test_compiled_gradients_are_those_of_eager_mode(native_device, backward):
    torch.compiler.reset()
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 80, device=native_device), backward=backward)
    x = torch.randn(9, 96, device=native_device, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_the_defaults_are_those_of_the_forward():
    linear = torch.nn.Linear(40, 24)
    assert QuantLinear.from_linear(linear).backward == "int8"
    assert QuantLinear.from_linear(linear, outlier_threshold=6.0).backward == "exact"
    assert QuantLinear.from_linear(linear, "weight_only").backward == "exact"
    static = QuantLinear.from_linear(linear)
    static.to_static(0.1, 0)
    assert static.backward == "int8"


def test_saved_layers_keep_what_was_asked_for(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    mixft.quantize_(model, backward="16bit", include="0")
    mixft.quantize_(model, include="1")
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    twin = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    mixft.load_quantized(twin, tmp_path / "model.safetensors")
    assert [layer.backward for layer in twin] == ["16bit", "int8"]


def noisy(layer, passes):
    """Gradients of which one feature takes nearly all of the range."""
    for _ in range(passes):
        out = layer(torch.randn(40, 128, requires_grad=True))
        grad = torch.randn_like(out)
        grad[:, 5] = 3000.0
        out.backward(grad)


def test_a_noisy_gradient_goes_on_in_floats(without_interpreter):
    layer = QuantLinear(128, 128)
    with pytest.warns(UserWarning, match=r"its gradients run in floats from training pass 2 on"):
        noisy(layer, 2)
    assert layer.backward == "16bit"
    assert layer.guard.sqnr["gradient"] < 10
    (report,) = mixft.model_report(torch.nn.Sequential(layer)).layers
    assert (report.mode, report.backward, report.fallback) == ("dynamic", "16bit", "gradients")
    unwatched = QuantLinear(128, 128, min_sqnr=None)
    noisy(unwatched, 3)
    assert unwatched.backward == "int8"


def test_opcheck(device):
    grad, weight, scale, left, right = operands((5, 32, 8), device=device)
    for factors in ((None, None), (left, right)):
        torch.library.opcheck(torch.ops.mixft.int8_input_gradient.default, (grad, weight, scale, *factors))
    torch.library.opcheck(torch.ops.mixft.float_input_gradient.default, (grad, weight, scale, False))


@pytest.mark.parametrize("serve", [dynamic_int8_linear, weight_only_matmul, outlier_int8_linear])
def test_an_unknown_backward_is_refused(serve):
    _, weight, scale, *_ = operands((2, 4, 3))
    options = {"threshold": 6.0} if serve is outlier_int8_linear else {}
    with pytest.raises(ValueError, match=r"backward must be one of int8, 16bit, exact .* it is 'weight_grad_16bit'"):
        serve(torch.randn(2, 3), weight, scale, backward="weight_grad_16bit", **options)
