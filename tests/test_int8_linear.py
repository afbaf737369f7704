"""Int8 linear layers: against FP64 with the quantization done by the test itself, and against nn.Linear."""

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_budget
from torch.utils.checkpoint import checkpoint

from mixft.nn import Linear, QuantLinear
from mixft.ops import dynamic_int8_linear, quantize, training_int8_linear

# 16-bit operands make exact ties, where x / scale and x * (1 / scale) may round apart: one step of 1/127 in a sum.
FLIP = {torch.float32: 2**-12, torch.bfloat16: 2**-7, torch.float16: 2**-7}
SHAPES = [(1, 16, 8), (17, 66, 33), (40, 130, 70), (5, 1, 33), (17, 6, 1), (1, 1, 1), (0, 8, 4)]


@pytest.fixture(autouse=True)
def small_layers_in_int8_too(monkeypatch):
    monkeypatch.setattr("mixft.nn.int8_training.LEAST_ROWS", 0)
    monkeypatch.setattr("mixft.nn.int8_training.LEAST_PRODUCTS", 0)


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """FP64 values of the symmetric int8 quantization of ``x`` reduced over ``dim``, with FP32 scales."""
    x = x.detach().cpu().float()
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().double() * scale.double()


def exact_training(x, weight, bias, grad):
    """The layer's formulas in FP64 on operands quantized independently of the package."""
    x_scale = x.detach().cpu().float().abs().amax(1, keepdim=True) / 127
    weight_scale = weight.detach().cpu().float().abs().amax(1) / 127
    x_q, weight_q = rounded(x, 1), rounded(weight, 1)
    grad = grad.cpu().float()
    for_x = rounded(grad * weight_scale, 1) @ (weight_q / weight_scale.double()[:, None])
    for_weight = rounded(grad * x_scale, 0).t() @ (x_q / x_scale.double())
    return x_q @ weight_q.t() + bias.detach().double().cpu(), for_x, for_weight, grad.double().sum(0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_products_match_fp64(device, shape, dtype):
    M, K, N = shape
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    weight = torch.randn(N, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    grad = torch.randn(M, N, device=device).to(dtype)
    y = training_int8_linear(x, weight, bias)
    assert y.dtype == dtype
    y.backward(grad)
    exact = exact_training(x, weight, bias, grad)
    for got, want in zip((y, x.grad, weight.grad, bias.grad), exact, strict=True):
        assert_within_budget(got, want, want.to(got.dtype), FLIP[dtype])


def test_training_gradients_follow_nn_linear(device):
    x = torch.randn(4, 9, 96, device=device, requires_grad=True)
    linear = torch.nn.Linear(96, 64, device=device)
    layer = QuantLinear.from_linear(linear, "train")
    grad = torch.randn(4, 9, 64, device=device)
    parameters = (x, linear.weight, linear.bias)
    expected = torch.autograd.grad(linear(x), parameters, grad)
    found = torch.autograd.grad(layer(x), parameters, grad)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() <= 0.02 * want.norm()


def test_only_the_gradients_wanted_are_computed(device):
    x = torch.randn(5, 32, device=device)
    weight = torch.randn(7, 32, device=device, requires_grad=True)
    training_int8_linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad.shape == weight.shape
    x.requires_grad_()
    frozen = weight.detach()
    training_int8_linear(x, frozen).sum().backward()
    assert x.grad.shape == x.shape


def test_a_changed_weight_is_seen(device):
    linear = torch.nn.Linear(32, 16, device=device)
    layer = QuantLinear.from_linear(linear, "train")
    x = torch.randn(3, 32, device=device)
    before = layer(x)
    linear.weight.data.neg_()
    linear.bias.data.neg_()
    assert torch.equal(layer(x), -before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_matches_fp64(device, shape, dtype):
    M, K, N = shape
    linear = torch.nn.Linear(K, N, device=device, dtype=dtype)
    layer = QuantLinear.from_linear(linear, "dynamic")
    x = torch.randn(2, M, K, device=device).to(dtype)
    exact = rounded(x, -1) @ rounded(linear.weight, 1).t() + linear.bias.detach().double().cpu()
    with torch.no_grad():
        out = layer(x)
    assert out.dtype == dtype
    assert_within_budget(out, exact, exact.to(dtype), FLIP[dtype])


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_frozen_modes_pass_gradients_to_input_and_bias(device, mode):
    linear = torch.nn.Linear(40, 24, device=device)
    layer = QuantLinear.from_linear(linear, mode, backward="exact")
    x = torch.randn(3, 5, 40, device=device, requires_grad=True)
    grad = torch.randn(3, 5, 24, device=device)
    layer(x).backward(grad)
    exact = grad.double().cpu() @ (layer.weight.double() * layer.weight_scale.double()).cpu()
    assert_within_budget(x.grad, exact, exact.float(), 2**-20)
    assert_within_budget(layer.bias.grad, grad.double().cpu().sum((0, 1)), grad.sum((0, 1)), 2**-20)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        dynamic_int8_linear(x, layer.weight, layer.weight_scale, activation="relu")


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_an_activation_is_kept_with_and_without_gradients(device, mode, activation):
    linear = Linear(64, 48, activation=activation, device=device)
    layer = QuantLinear.from_linear(linear, mode)
    plain = QuantLinear.from_linear(torch.nn.Linear(64, 48, device=device), mode)
    plain.load_state_dict(layer.state_dict())
    torch_activation = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    x = torch.randn(6, 64, device=device, requires_grad=True)
    expected = torch_activation(plain(x))
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_module_conveniences(device, mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(48, 40, device=device), mode)
    x = torch.randn(3, 48, device=device)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    twin = QuantLinear(48, 40, mode=mode, device=device)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), expected)
    assert f"mode='{mode}'" in repr(layer)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    half = copy.deepcopy(layer).half()
    assert half(x.half()).dtype == torch.float16
    if mode != "train":
        assert half.weight_scale.dtype == torch.float32
        assert torch.equal(half.weight_scale, layer.weight_scale)
        assert half.weight.dtype == torch.int8


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.to, torch.nn.Module.type])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
def test_casts_leave_integers_and_scales_alone(device, mode, cast):
    layer = QuantLinear.from_linear(torch.nn.Linear(48, 40, device=device), mode if mode != "static" else "dynamic")
    if mode == "static":
        layer.to_static(0.03, 5)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast(layer, *([] if cast is torch.nn.Module.half else [torch.float16]))
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys()
    assert all(
        after[name].dtype == buffer.dtype and torch.equal(after[name], buffer) for name, buffer in before.items()
    )
    assert layer.bias.dtype == layer.to_linear().weight.dtype == torch.float16
    assert layer(torch.randn(3, 48, device=device, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_torch_compile_has_no_graph_break(device, mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(48, 40, device=device), mode)
    x = torch.randn(3, 48, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(x), compiled(x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("dynamic", {}), ("dynamic", {"outlier_threshold": 2.0}), ("weight_only", {}), ("train", {})],
)
def test_a_traced_layer_can_be_saved_and_trained(native_device, mode, options):
    layer = QuantLinear.from_linear(torch.nn.Linear(48, 40, device=native_device), mode, **options)
    x, other = torch.randn(2, 64, 48, device=native_device)
    traced = torch.jit.trace(layer, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(other), layer(other))
    layer.zero_grad()
    traced(other).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    layer(other).sum().backward()
    assert found
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in layer.named_parameters())


def inference_layer(mode, device):
    layer = QuantLinear.from_linear(torch.nn.Linear(48, 40, device=device), "dynamic" if mode == "static" else mode)
    if mode == "static":
        layer.to_static(0.03, -5)
    return layer


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
def test_inference_layers_under_checkpointing_on_meta_and_by_shape(native_device, mode):
    layer = inference_layer(mode, native_device)
    x = torch.randn(2, 3, 48, device=native_device, requires_grad=True)
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    checkpointed = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(checkpointed, expected)
    assert torch.equal(torch.autograd.grad(checkpointed.sum(), x)[0], grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1])
        torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
        assert layer(x[:0]).shape == (0, 3, 40)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (2, 3, 40)
    assert torch.equal(layer.to(native_device)(x), expected)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0)])
def test_layers_without_features(native_device, mode, in_features, out_features):
    layer = QuantLinear(in_features, out_features, mode=mode, device=native_device)
    x = torch.randn(2, 3, in_features, device=native_device, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 3, out_features))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_an_input_that_is_no_tensor_is_named(mode):
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor; it is a list"):
        QuantLinear(4, 4, mode=mode)([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("linear", "mode", "error", "message"),
    [
        (torch.nn.Linear(4, 4, dtype=torch.float64), "dynamic", TypeError, "weight of linear .* it is torch.float64"),
        (torch.nn.Linear(4, 4, dtype=torch.complex64), "train", TypeError, "weight of linear .* it is torch.complex64"),
        (torch.nn.LazyLinear(4), "train", ValueError, "linear has no weight yet; call it first"),
        (torch.nn.Linear(4, 4, device="meta"), "dynamic", ValueError, "linear has its weight on the meta device"),
    ],
)
def test_a_linear_that_cannot_be_taken_is_named(linear, mode, error, message):
    with pytest.raises(error, match=message):
        QuantLinear.from_linear(linear, mode)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
def test_inference_layers_name_what_does_not_fit(mode):
    layer = inference_layer(mode, "cpu")
    with pytest.raises(ValueError, match=r"shape \(2, 47\) and weight \(40, 48\); the last .* in_features, 48"):
        layer(torch.ones(2, 47))
    with pytest.raises(TypeError, match=r"must be torch.float16 or .*; it is torch.float64"):
        layer(torch.ones(2, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        layer(torch.ones(2, 48, device="meta"))


@pytest.mark.parametrize("shape_gating", [False, True])
def test_a_training_layer_cast_to_fp64_is_named(native_device, shape_gating):
    layer = QuantLinear(48, 40, mode="train", device=native_device, shape_gating=shape_gating).double()
    x = torch.ones(2, 48, device=native_device)
    for given in (x, x.double()):
        with pytest.raises(TypeError, match=r"weight must be torch.float16 or .*; it is torch.float64"):
            layer(given)
    assert layer.float()(x).dtype == torch.float32


def test_to_linear_round_trip(device):
    linear = torch.nn.Linear(30, 20, device=device)
    train = QuantLinear.from_linear(linear, "train").to_linear()
    assert train.weight is linear.weight
    back = QuantLinear.from_linear(linear, "dynamic").to_linear()
    bound = linear.weight.abs().amax(1, keepdim=True) / 254 * 1.001
    assert ((back.weight - linear.weight).abs() <= bound).all()
    assert torch.equal(back.bias, linear.bias)


def test_opcheck(device):
    x = torch.randn(5, 32, device=device, requires_grad=True)
    weight = torch.randn(8, 32, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    values = torch.randint(-127, 128, (8, 32), dtype=torch.int8, device=device)
    scale = torch.rand(8, 1, device=device)
    torch.library.opcheck(torch.ops.mixft.dynamic_int8_linear.default, (x, values, scale, bias, "none"))
    x_values = torch.randint(-127, 128, (5, 32), dtype=torch.int8, device=device)
    seed = torch.tensor(3, device=device)
    for backward in ("int8", "weight_grad_16bit", "16bit"):
        quantized = (x_values, scale[:5], values, scale, seed, backward)
        torch.library.opcheck(torch.ops.mixft.training_int8_linear_forward.default, (x, weight, bias, *quantized))
        arguments = (torch.randn(5, 8, device=device), weight.detach(), *quantized, torch.float32, True, True, True)
        torch.library.opcheck(torch.ops.mixft.training_int8_linear_backward.default, arguments)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuantLinear(4, 4, mode="int8"), ValueError, "mode must be one of weight_only, dynamic, train"),
        (lambda: QuantLinear(4, 4, activation="tanh"), ValueError, "activation must be None or one of"),
        (lambda: QuantLinear.from_linear(torch.nn.Conv1d(1, 1, 1)), TypeError, "it is a Conv1d"),
        (lambda: QuantLinear(4, 3)(torch.ones(2, 5)), ValueError, r"input has shape \(2, 5\) and weight \(3, 4\)"),
        (lambda: QuantLinear(4, 3, mode="train")(torch.ones(2, 5)), ValueError, r"input has shape \(2, 5\)"),
        (lambda: QuantLinear(4, 3)(torch.ones(2, 4).long()), TypeError, "x must be torch.float16 or"),
        (
            lambda: dynamic_int8_linear(torch.ones(2, 4), torch.ones(3, 4).to(torch.int8), torch.ones(3)),
            ValueError,
            r"weight_scale must have shape \(3, 1\)",
        ),
        (
            lambda: dynamic_int8_linear(
                torch.ones(2, 4), torch.ones(3, 4).to(torch.int8), torch.ones(3, 1, device="meta")
            ),
            ValueError,
            "all tensors must be on one device; got weight on cpu, weight_scale on meta",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weight_with_nan_is_refused():
    linear = torch.nn.Linear(4, 4)
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        QuantLinear.from_linear(linear, "dynamic")


def test_products_without_integer_instructions_stay_exact_under_autocast(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    layer = QuantLinear.from_linear(torch.nn.Linear(300, 40), "train")
    x = torch.randn(9, 300).bfloat16().requires_grad_()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y, *torch.autograd.grad(y.sum(), (x, layer.weight))

    expected = run()
    monkeypatch.setattr("mixft.cpu.int8_matmul.int_mm_is_fast_and_exact", lambda: False)
    for found, want in zip(run(), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_reach_the_results(device, dtype, bad):
    x = torch.randn(6, 40, device=device).to(dtype).requires_grad_()
    weight = torch.randn(24, 40, device=device, requires_grad=True)
    grad = torch.randn(6, 24, device=device).to(dtype)
    spoiled = x.detach().clone()
    spoiled[2, 3] = bad
    y = training_int8_linear(spoiled, weight)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()
    dynamic = QuantLinear.from_linear(torch.nn.Linear(40, 24, device=device, dtype=dtype))
    with torch.no_grad():
        assert (~dynamic(spoiled).isfinite()).any(1).tolist() == [False, False, True, False, False, False]
    grad[4, 5] = bad
    grad_x, grad_weight = torch.autograd.grad(training_int8_linear(x, weight), (x, weight), grad)
    assert (~grad_x.isfinite()).any(1).tolist() == [False, False, False, False, True, False]
    assert (~grad_weight.isfinite()).any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_small_fp16_gradients_survive_frozen_weights(device, mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 32, dtype=torch.float16).to(device), mode)
    x = torch.randn(5, 64).half().to(device).requires_grad_()
    grad = torch.full((5, 32), 1e-5, device=device).half()
    layer(x).backward(grad)
    exact = grad.double().cpu() @ (layer.weight.double() * layer.weight_scale.double()).cpu()
    assert_within_budget(x.grad, exact, exact.half(), 2**-9)
    assert x.grad.count_nonzero() > 0.9 * x.grad.numel()


def test_weight_gradients_over_many_rows_are_summed_in_parts(device, monkeypatch):
    x = torch.randn(50, 20, device=device)
    weight = torch.randn(12, 20, device=device, requires_grad=True)
    grad = torch.randn(50, 12, device=device)
    (whole,) = torch.autograd.grad(training_int8_linear(x, weight), weight, grad)
    monkeypatch.setattr(sys.modules["mixft.ops.training_int8_linear"], "MOST_ROWS", 16)
    (parts,) = torch.autograd.grad(training_int8_linear(x, weight), weight, grad)
    exact = grad.double().t() @ x.double()
    assert (parts - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(parts, whole)


@pytest.mark.parametrize("name", ["quantized_x", "quantized_weight"])
def test_quantized_operands_that_do_not_fit_are_refused(name):
    x, weight = torch.randn(3, 48), torch.randn(40, 48)
    values, scale, _ = quantize({"quantized_x": x, "quantized_weight": weight}[name])
    for wrong in ((values, scale[:1]), (values[1:], scale), (values, scale.view(-1))):
        with pytest.raises(ValueError, match=f"{name} must be values of shape"):
            training_int8_linear(x, weight, **{name: wrong})
    with pytest.raises(TypeError, match=f"the scale of {name} must be torch.float32"):
        training_int8_linear(x, weight, **{name: (values, scale.half())})
    with pytest.raises(TypeError, match=f"the values of {name} must be torch.int8"):
        training_int8_linear(x, weight, **{name: (values.float(), scale)})
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        training_int8_linear(x, weight, **{name: (values, scale.to("meta"))})


def test_one_scale_for_all_rows_is_read_once_a_row(device):
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((70, 48), (40, 48)))
    grad = torch.randn(70, 40, device=device)
    quantized = []
    for tensor in (x, weight):
        values, scale, _ = quantize(tensor, dim=None)
        quantized.append((values, scale.expand(len(tensor), 1)))
    found = training_int8_linear(x, weight, quantized_x=quantized[0], quantized_weight=quantized[1])
    repeated = [(values, scale.clone(memory_format=torch.contiguous_format)) for values, scale in quantized]
    expected = training_int8_linear(x, weight, quantized_x=repeated[0], quantized_weight=repeated[1])
    for left, right in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (found, expected)), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(found, expected)
