"""The choices of int8 training: what the backward runs in, how gradients are rounded, which shapes stay in floats."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, assert_within_budget
from torch.utils.checkpoint import checkpoint

import mixft
from mixft.nn import QuantLinear
from mixft.nn.int8_training import gains
from mixft.ops import training_int8_linear
from mixft.ops.training_int8_linear import float_dtype

BACKWARDS = ("int8", "weight_grad_16bit", "16bit")


def problem(device, dtype=torch.float32, rows=66, inner=130, columns=70):
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    weight = torch.randn(columns, inner, device=device, requires_grad=True)
    grad = torch.randn(rows, columns, device=device).to(dtype)
    return x, weight, grad


def decibels(found: torch.Tensor, exact: torch.Tensor) -> float:
    noise = (found.double().cpu() - exact).square().sum() / exact.square().sum()
    return -10 * noise.log10().item()


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_stand_30_decibels_above_their_noise(device, backward, dtype):
    x, weight, grad = problem(device, dtype)
    for stochastic in (False, True):
        y = training_int8_linear(x, weight, backward=backward, stochastic=stochastic)
        found = torch.autograd.grad(y, (x, weight), grad)
        x64, weight64, grad64 = (tensor.detach().double().cpu() for tensor in (x, weight, grad))
        assert decibels(y.detach(), x64 @ weight64.t()) > 30
        assert decibels(found[0], grad64 @ weight64) > (30 if backward != "16bit" else 40)
        assert decibels(found[1], grad64.t() @ x64) > 30
        assert found[0].dtype == dtype
        assert found[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_gradients_are_those_of_what_the_forward_computed(device, dtype):
    x, weight, grad = problem(device, dtype)
    scale = x.detach().float().abs().amax(1, keepdim=True) / 127
    with torch.no_grad():
        # Halfway between two steps the last bit of the quotient decides, and a step is more than the budget.
        x[((x.float() / scale).abs() % 1 - 0.5).abs() < 1e-4] = 0
    x_rounded = ((x.detach().float() / scale).round() * scale).cpu()
    computed = float_dtype(x)
    exact = grad.double().cpu().t() @ x_rounded.double()
    own = grad.cpu().to(computed).t() @ x_rounded.to(computed)
    for backward in ("weight_grad_16bit", "16bit"):
        y = training_int8_linear(x, weight, backward=backward)
        _, grad_weight = torch.autograd.grad(y, (x, weight), grad)
        assert_within_budget(grad_weight, exact, own, EPSILON[computed])
    (grad_x,) = torch.autograd.grad(training_int8_linear(x, weight, backward="16bit"), x, grad)
    exact = grad.double().cpu() @ weight.detach().double().cpu()
    own = (grad.to(computed) @ weight.detach().to(computed)).to(dtype)
    assert_within_budget(grad_x, exact, own, EPSILON[torch.float32])


def test_random_rounding_keeps_the_mean_and_repeats_with_the_seed(device):
    x, weight, _ = problem(device, rows=9, inner=20, columns=12)
    # With one large element a row, all others lie far below half a step and are lost to the nearest.
    grad = torch.full((9, 12), 1e-3, device=device)
    grad[:, 0] = 1.0

    def gradient(stochastic):
        return torch.autograd.grad(training_int8_linear(x, weight, stochastic=stochastic), weight, grad)[0]

    torch.manual_seed(7)
    first, second = gradient(True), gradient(True)
    torch.manual_seed(7)
    assert torch.equal(gradient(True), first)
    assert not torch.equal(second, first)
    x_grad = [torch.autograd.grad(training_int8_linear(x, weight, stochastic=True), x, grad)[0] for _ in range(64)]
    # Of the weight as it is rounded, which no average brings back.
    exact_x = grad @ mixft.ops.dequantize(*mixft.ops.quantize(weight.detach())[:2], dtype=torch.float32)
    nearest_x = torch.autograd.grad(training_int8_linear(x, weight), x, grad)[0]
    mean_error = (torch.stack(x_grad).mean(0) - exact_x).norm()
    assert mean_error < 0.6 * (nearest_x - exact_x).norm()


def test_random_rounding_leaves_what_is_drawn_after_it_alone_under_checkpointing(native_device):
    """A reentrant checkpoint computes the forward without gradients first: the dropout has to be the same in both."""
    layer = QuantLinear(64, 64, mode="train", stochastic=True, shape_gating=False, device=native_device)
    masks = []

    def block(x):
        y = layer(x)
        masks.append(torch.rand_like(y) > 0.5)
        return y * masks[-1]

    for reentrant in (True, False):
        masks.clear()
        x = torch.randn(40, 64, device=native_device, requires_grad=True)
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        first, again = masks
        assert torch.equal(first, again)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_pass_random_rounding(device, bad):
    x, weight, grad = problem(device, rows=6, inner=40, columns=24)
    grad[4, 5] = bad
    y = training_int8_linear(x, weight, stochastic=True)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert (~grad_x.isfinite()).any(1).tolist() == [False, False, False, False, True, False]
    assert (~grad_weight.isfinite()).any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("backward", BACKWARDS)
def test_what_the_backward_keeps_of_the_input_is_int8(native_device, backward):
    x, weight, _ = problem(native_device, rows=512, inner=384, columns=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        training_int8_linear(x, weight, backward=backward)
    owned = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() != weight.data_ptr()}
    int8_bytes = x.numel() + 4 * len(x)
    assert sum(owned.values()) <= int8_bytes + weight.numel() + 4 * len(weight)


def test_a_second_derivative_is_refused_rather_than_wrong(native_device):
    x, weight, _ = problem(native_device)
    (gradient,) = torch.autograd.grad(training_int8_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_small_inputs_are_multiplied_in_floats(native_device):
    linear = torch.nn.Linear(384, 384, device=native_device)
    layer = QuantLinear.from_linear(linear, "train")
    always = QuantLinear.from_linear(linear, "train", shape_gating=False)
    few, many = torch.randn(2, 8, 384, device=native_device), torch.randn(3, 40, 384, device=native_device)
    assert torch.equal(layer(few), linear(few))
    assert not torch.equal(always(few), linear(few))
    assert torch.equal(layer(many), always(many))
    assert not torch.equal(layer(many), linear(many))
    half = copy.deepcopy(layer).bfloat16()
    expected = F.linear(few.bfloat16(), half.weight, half.bias)
    assert torch.equal(half(few.bfloat16()), expected)
    with torch.autocast(native_device.type, torch.bfloat16):
        torch.testing.assert_close(layer(few), linear(few))


def test_the_border_of_gating():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not gains(31, 4096, 4096, cpu)
    assert gains(32, 4096, 4096, cpu)
    assert not gains(64, 128, 128, cpu)
    assert gains(512, 128, 128, cpu)
    assert not gains(31, 4096, 4096, gpu)
    assert gains(64, 128, 128, gpu)


def test_options_reach_the_layers_and_errors_name_them():
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
    weight = model[0].weight
    mixft.quantize_(model, "train", backward="weight_grad_16bit")
    assert "backward='weight_grad_16bit'" in repr(model[0])
    report = mixft.quantize_(model, "train", include="0", backward="16bit", stochastic=True)
    assert [layer.name for layer in report.quantized] == ["0"]
    assert model[0].int8_training.options.backward == "16bit"
    assert model[0].weight is weight
    with pytest.raises(ValueError, match="already in mode 'train'"):
        mixft.quantize_(model, "train", include="0", backward="16bit", stochastic=True)
    with pytest.raises(ValueError, match="backward must be one of int8, weight_grad_16bit, 16bit; it is 'fp8'"):
        mixft.quantize_(model, "train", backward="fp8")
    with pytest.raises(ValueError, match="shape_gating, stochastic is for mode 'train'; the mode is 'dynamic'"):
        mixft.quantize_(model, "dynamic", stochastic=True, shape_gating=False)
    with pytest.raises(TypeError, match="there is no option backwards; there are backward, min_sqnr, shape_gating, st"):
        QuantLinear(4, 4, mode="train", backwards="int8")
    for mode in ("train", "dynamic"):
        with pytest.raises(TypeError, match="min_sqnr is '10'; it must be a number of dB, or None"):
            QuantLinear(4, 4, mode=mode, min_sqnr="10")
        with pytest.raises(ValueError, match="min_sqnr is NaN"):
            QuantLinear(4, 4, mode=mode, min_sqnr=float("nan"))


def test_copies_and_pickles_train_alike(native_device):
    layer = QuantLinear(40, 24, mode="train", shape_gating=False, backward="weight_grad_16bit", device=native_device)
    x = torch.randn(5, 40, device=native_device)
    layer(x).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.int8_training.options == layer.int8_training.options
        assert torch.equal(twin(x), layer(x))
