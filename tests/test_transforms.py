"""Layers under the transforms of torch.func and in forward mode, where torch's own layers can be used too."""

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, assert_within_budget, error
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from mixft.nn import MLP, Linear, QuantLinear
from mixft.ops import dynamic_int8_linear

LAYERS = {
    "linear": (lambda: Linear(6, 5), lambda p, x: F.linear(x, p["weight"], p["bias"])),
    "no bias": (lambda: Linear(6, 5, bias=False), lambda p, x: F.linear(x, p["weight"])),
    "gelu": (lambda: Linear(6, 5, activation="gelu"), lambda p, x: F.gelu(F.linear(x, p["weight"], p["bias"]))),
    "silu": (lambda: Linear(6, 5, activation="silu"), lambda p, x: F.silu(F.linear(x, p["weight"], p["bias"]))),
    "mlp": (
        lambda: MLP(6, 8, 5),
        lambda p, x: F.linear(F.gelu(F.linear(x, p["fc1.weight"], p["fc1.bias"])), p["fc2.weight"], p["fc2.bias"]),
    ),
}


def jacobian_vector_product(function, parameters, x):
    return jvp(lambda x: function(parameters, x), (x,), (torch.cos(x),))[1]


def of_dual_numbers(function, parameters, x):
    with forward_ad.dual_level():
        tangents = {name: forward_ad.make_dual(value, value.sin()) for name, value in parameters.items()}
        return forward_ad.unpack_dual(function(tangents, x)).tangent


def gradient(function, parameters, x):
    return grad(lambda parameters: function(parameters, x).sin().sum())(parameters)


def gradient_of_each_sample(function, parameters, x):
    return vmap(grad(lambda parameters, x: function(parameters, x).sin().sum()), (None, 0))(parameters, x)


def second_derivatives(function, parameters, x):
    return hessian(lambda x: function(parameters, x).sin().sum())(x)


@pytest.mark.parametrize(
    "transform",
    [gradient, gradient_of_each_sample, second_derivatives, jacobian_vector_product, of_dual_numbers],
)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_floats(device, name, residual, transform):
    torch.manual_seed(1)
    make, formula = LAYERS[name]
    layer = make().to(device)
    x = torch.randn(4, 6, device=device)
    added = torch.randn(5, device=device) if residual else None
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def ours(parameters, x):
        return functional_call(layer, parameters, (x, None if added is None else added.expand(*x.shape[:-1], 5)))

    def plain(parameters, x):
        return formula(parameters, x) + (0.0 if added is None else added.to(x.dtype))

    found, own = transform(ours, parameters, x), transform(plain, parameters, x)
    exact = transform(plain, {key: value.double() for key, value in parameters.items()}, x.double())
    for key in parameters if isinstance(found, dict) else [None]:
        got, truth, theirs = (result if key is None else result[key] for result in (found, exact, own))
        assert_within_budget(got, truth, theirs, EPSILON[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_layers_keep_their_dtype(device, dtype):
    x = torch.randn(4, 6, device=device, dtype=dtype)
    layer = Linear(6, 5, activation="relu", device=device, dtype=dtype)
    residual = torch.randn(5, device=device)
    assert vmap(layer)(x).dtype == dtype
    out = vmap(lambda x: layer(x, residual))(x)
    assert out.dtype == torch.float32
    own = F.relu(x @ layer.weight.t() + layer.bias) + residual  # rounded in between
    exact = F.relu(F.linear(*(tensor.double() for tensor in (x, layer.weight, layer.bias)))) + residual.double()
    assert_within_budget(out, exact, own, EPSILON[torch.float32])


def test_a_sum_in_main_grad_has_no_transform(device):
    layer = Linear(6, 5, device=device, fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros(5, 6, device=device)
    with pytest.raises(NotImplementedError, match="fuse_wgrad_accumulation=False"):
        grad(lambda x: layer(x).sum())(torch.randn(4, 6, device=device))
    assert not layer.weight.main_grad.any()


def assert_equal_but_for_order(got, expected):
    """Hold FP32 results of the same computation, in which a sum or a vector may begin elsewhere."""
    assert error(got, expected.double()) <= EPSILON[torch.float32] * expected.abs().max()


def frozen_layer(device, mode, **options):
    torch.manual_seed(3)
    made = QuantLinear.from_linear(
        torch.nn.Linear(48, 40, device=device), "dynamic" if mode == "static" else mode, **options
    )
    if mode == "static":
        made.to_static(0.03, -7)
    return made


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("weight_only", {}), ("dynamic", {}), ("static", {}), ("train", {}), ("train", {"shape_gating": False})],
)
@pytest.mark.parametrize("with_activation", [False, True])
def test_int8_layers_map_over_samples(device, mode, options, with_activation):
    layer = frozen_layer(device, mode, **options)
    layer.activation = "silu" if with_activation else None
    x = torch.randn(3, 4, 48, device=device)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).sin().sum()

    in_parameters, in_x = vmap(grad(loss, (0, 1)), (None, 0))(parameters, x)
    with torch.no_grad():
        outputs = vmap(layer, 1, 1)(x)
    for number, sample in enumerate(x):
        sample = sample.clone().requires_grad_()
        out = layer(sample)
        gradients = torch.autograd.grad(out.sin().sum(), [*layer.parameters(), sample])
        expected = dict(zip([*parameters, "x"], gradients, strict=True))
        assert_equal_but_for_order(outputs[number], out.detach())
        for key, true in expected.items():
            got = in_x[number] if key == "x" else in_parameters[key][number]
            assert_equal_but_for_order(got, true)


def test_nothing_but_the_input_of_an_int8_layer_is_mapped_over(device):
    layer = frozen_layer(device, "dynamic")
    x = torch.randn(4, 48, device=device)
    biases = torch.randn(3, 40, device=device)
    with pytest.raises(NotImplementedError, match="map over its input only"):
        vmap(lambda bias: dynamic_int8_linear(x, layer.weight, layer.weight_scale, bias))(biases)
