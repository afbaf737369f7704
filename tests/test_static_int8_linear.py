"""The int8 layer with one scale and zero point for its input, against FP64; and the one with outlier columns."""

import copy
import pickle

import pytest
import torch
from conftest import assert_within_budget

from mixft.nn import QuantLinear
from mixft.nn.frozen_training import FrozenOptions, FrozenTraining
from mixft.ops import dynamic_int8_linear, outlier_int8_linear, static_int8_linear
from mixft.ops.activation import activate

# 16-bit inputs make exact ties, which x / s and x * (1 / s) may round apart: one step in a sum.
FLIP = {torch.float32: 2**-11, torch.bfloat16: 2**-7, torch.float16: 2**-7}
SHAPES = [(1, 16, 8), (17, 66, 33), (40, 130, 70), (0, 8, 4), (3, 0, 2)]


def operands(shape, dtype, device):
    M, K, N = shape
    x = (torch.randn(2, M, K) + 0.7).to(device, dtype)
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8).to(device)
    return x, weight, (torch.rand(N, 1) / 100).to(device), torch.randn(N).to(device, dtype)


def static_range(scale, zero_point, device):
    return {
        "input_scale": torch.tensor(scale, device=device),
        "input_zero_point": torch.tensor(zero_point, dtype=torch.int32, device=device),
    }


def exact_static(x, weight, weight_scale, bias, scale, zero_point):
    x = x.detach().double().cpu().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)
    steps = ((x / scale + zero_point).round().clamp(-128, 127) - zero_point) * scale
    return steps @ (weight.double() * weight_scale.double()).cpu().t() + bias.detach().double().cpu()


@pytest.mark.parametrize("zero_point", [0, -37, -128])
@pytest.mark.parametrize("dtype", FLIP)
@pytest.mark.parametrize("shape", SHAPES)
def test_static_values(device, shape, dtype, zero_point):
    x, *rest = operands(shape, dtype, device)
    found = static_int8_linear(x, *rest, **static_range(0.0153, zero_point, device))
    assert found.dtype == dtype
    exact = exact_static(x, *rest, 0.0153, zero_point)
    assert_within_budget(found, exact, exact.to(dtype), FLIP[dtype])


def test_values_beyond_the_range_are_clamped_and_nan_counts_as_zero(device):
    x, *rest = operands((3, 40, 8), torch.float32, device)
    x[0, 1, 3], x[1, 0, 5], x[1, 2, 7], x[0, 0, 0] = torch.inf, -torch.inf, torch.nan, 1e20
    found = static_int8_linear(x, *rest, **static_range(0.02, 11, device))
    exact = exact_static(x, *rest, 0.02, 11)
    assert_within_budget(found, exact, exact.float(), FLIP[torch.float32])


@pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned"])
def test_layouts(device, layout):
    x, *rest = operands((9, 33, 8), torch.float32, device)
    x = x[0]
    other = {
        "transposed": x.t().contiguous().t(),
        "strided": torch.stack([x, x], 2)[:, :, 0],
        "misaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }[layout]
    scale = static_range(0.02, 3, device)
    assert torch.equal(static_int8_linear(other, *rest, **scale), static_int8_linear(x, *rest, **scale))


def static_layer(device, activation=None):
    linear = torch.nn.Linear(48, 40, device=device)
    layer = QuantLinear(48, 40, mode="dynamic", activation=activation, device=device)
    layer.load_state_dict(QuantLinear.from_linear(linear).state_dict())
    layer.to_static(0.03, -20)
    return layer


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_a_static_layer_with_and_without_gradients(device, activation):
    layer, plain = static_layer(device, activation), static_layer(device)
    plain.load_state_dict(layer.state_dict())
    layer.int8_training = FrozenTraining(FrozenOptions("exact"), floats=False)
    x = torch.randn(3, 5, 48, device=device, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out)
    grad = torch.randn_like(out)
    pre = plain(x).detach().requires_grad_()
    (outer,) = torch.autograd.grad(activate(pre, activation), pre, grad)
    found = torch.autograd.grad(out, (x, layer.bias), grad)
    exact = outer.double().cpu() @ (layer.weight.double() * layer.weight_scale.double()).cpu()
    assert_within_budget(found[0], exact, exact.float(), 2**-20)
    assert_within_budget(found[1], outer.double().cpu().sum((0, 1)), outer.sum((0, 1)), 2**-20)


def test_a_static_layer_as_a_module(device):
    layer = static_layer(device)
    x = torch.randn(3, 48, device=device)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    twin = QuantLinear(48, 40, mode="static", device=device)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), expected)
    assert "mode='static'" in repr(layer)
    half = copy.deepcopy(layer).half()
    assert half(x.half()).dtype == torch.float16
    assert half.input_scale.dtype == half.weight_scale.dtype == torch.float32
    assert torch.equal(half.input_scale, layer.input_scale)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 40)
    assert torch.equal(layer(x[0]), expected[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.requires_grad_()), expected)
    assert (layer.to_linear()(x) - expected).abs().max() < 0.2
    assert QuantLinear(48, 40, mode="static", device="meta").to_empty(device=device).input_scale.shape == ()


def test_calls_that_a_static_layer_refuses():
    x, *rest = operands((2, 8, 4), torch.float32, "cpu")
    scale = static_range(0.1, 0, "cpu")
    with pytest.raises(ValueError, match=r"input_scale must have one element; it has shape \(2,\)"):
        static_int8_linear(x, *rest, **{**scale, "input_scale": torch.ones(2)})
    with pytest.raises(TypeError, match=r"input_zero_point must be torch\.int32"):
        static_int8_linear(x, *rest, **{**scale, "input_zero_point": torch.ones(1)})
    with pytest.raises(ValueError, match=r"weight_sum must have shape \(4,\)"):
        static_int8_linear(x, *rest, **scale, weight_sum=torch.ones(3).int())
    with pytest.raises(ValueError, match="only a dynamic layer"):
        QuantLinear(8, 4, mode="weight_only").to_static(0.1, 0)
    for bad in ((0.0, 0), (1e-50, 0), (1e39, 0), (float("nan"), 0), (0.1, 128)):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            QuantLinear(8, 4).to_static(*bad)


def test_opcheck(device):
    x, weight, weight_scale, bias = operands((3, 16, 4), torch.float32, device)
    rows = x[0].requires_grad_()
    scale = tuple(static_range(0.1, 5, device).values())
    arguments = (rows, weight, weight_scale, bias, "none", *scale, weight.sum(1, dtype=torch.int32))
    torch.library.opcheck(torch.ops.mixft.static_int8_linear.default, arguments)
    torch.library.opcheck(torch.ops.mixft.outlier_int8_linear.default, (rows, weight, weight_scale, bias, 1.5))


@pytest.mark.parametrize("dtype", FLIP)
def test_outlier_columns_give_the_accuracy_back(device, dtype):
    x, weight, scale, bias = operands((17, 66, 33), dtype, device)
    x[..., 5] *= 60
    x[0, 3, 64] = -200
    exact = x.double().cpu() @ (weight.double() * scale.double()).cpu().t() + bias.double().cpu()
    rest = x.clone()
    rest[..., [5, 64]] = 0
    smooth = dynamic_int8_linear(rest, weight, scale)
    limit = (smooth.double().cpu() - rest.double().cpu() @ (weight.double() * scale.double()).cpu().t()).abs().max()
    found = outlier_int8_linear(x, weight, scale, bias, threshold=15.0)
    assert found.dtype == dtype
    error = (found.double().cpu() - exact).abs()
    # What the int8 part of the ordinary columns costs, and one rounding of the result.
    assert (error <= 1.01 * limit + torch.finfo(dtype).eps * exact.abs() + 1e-4).all()
    assert (dynamic_int8_linear(x, weight, scale, bias).double().cpu() - exact).abs().max() > 5 * limit


def test_without_outliers_it_is_the_dynamic_layer(device):
    x, *rest = operands((5, 40, 12), torch.float32, device)
    assert torch.equal(outlier_int8_linear(x, *rest, threshold=100.0), dynamic_int8_linear(x, *rest))
    assert outlier_int8_linear(x[:, :0], *rest, threshold=6.0).shape == (2, 0, 12)


def test_infinite_and_undefined_inputs_reach_the_rows_that_hold_them(device):
    x, *rest = operands((4, 40, 12), torch.float32, device)
    x[0, 1, 2], x[1, 2, 3] = torch.inf, torch.nan
    found = outlier_int8_linear(x, *rest, threshold=50.0)
    assert (~found.isfinite()).any(-1).nonzero().tolist() == [[0, 1], [1, 2]]


def test_an_outlier_layer(device):
    linear = torch.nn.Linear(48, 40, device=device)
    layer = QuantLinear.from_linear(linear, outlier_threshold=6.0)
    x = torch.randn(7, 48, device=device)
    x[:, 3] *= 100
    x.requires_grad_()
    plain = QuantLinear.from_linear(linear)
    expected = plain.to_linear()(x)
    assert (layer(x) - expected).norm() < 0.1 * (plain(x) - expected).norm()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert "outlier_threshold=6.0" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.dequantized_weight().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outlier_threshold": 0.0}, "the outlier threshold must be positive; it is 0.0"),
        ({"outlier_threshold": float("nan")}, "must be positive; it is nan"),
        ({"outlier_threshold": 6.0, "mode": "weight_only"}, "outlier_threshold=6.0 needs mode 'dynamic'"),
    ],
)
def test_thresholds_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantLinear(8, 4, **arguments)
