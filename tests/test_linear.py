"""``mixft.nn.Linear`` in ``torch.nn.Linear``'s place."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, assert_within_budget
from torch.utils.checkpoint import checkpoint

from mixft.nn import MLP, Linear, QuantLinear
from mixft.optim import AdamW


def pair(device, dtype=torch.float16, bias=True):
    """A torch layer and a mixft layer on the same parameters."""
    layer = torch.nn.Linear(33, 20, bias, device=device, dtype=dtype)
    return layer, Linear.from_linear(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 3, 33), (0, 33), (2, 0, 33)])
def test_forward_and_backward(device, shape, dtype, bias):
    theirs, ours = pair(device, dtype, bias)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    exact_layer = copy.deepcopy(theirs).double()
    exact_x = x.detach().double().requires_grad_()
    leaves = [x, *ours.parameters()]
    out, torch_out, exact = ours(x), theirs(x), exact_layer(exact_x)
    assert out.dtype == dtype
    assert_within_budget(out, exact, torch_out, EPSILON[torch.float32])
    grads = torch.autograd.grad(out.sum(), leaves)
    torch_grads = torch.autograd.grad(torch_out.sum(), leaves)
    exact_grads = torch.autograd.grad(exact.sum(), [exact_x, *exact_layer.parameters()])
    for got, own, truth in zip(grads, torch_grads, exact_grads, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, truth, own, EPSILON[torch.float32])


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation(device, activation):
    function = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    theirs, _ = pair(device)
    ours = Linear.from_linear(theirs, activation)
    x = torch.randn(6, 33, device=device).half()
    exact = function(copy.deepcopy(theirs).double()(x.double()))
    assert_within_budget(ours(x), exact, function(theirs(x)), EPSILON[torch.float32])


def test_weight_gradient_is_stored_without_a_copy(device):
    _, layer = pair(device)
    layer(torch.randn(5, 33, device=device).half()).sum().backward()
    assert layer.weight.grad.is_contiguous()
    assert layer.weight.grad.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device, dtype):
    theirs, ours = pair(device, torch.float32)
    x = torch.randn(5, 33, device=device).requires_grad_()
    with torch.autocast(device.type, dtype):
        out, expected = ours(x), theirs(x)
    assert out.dtype == expected.dtype == dtype
    assert_within_budget(out, copy.deepcopy(theirs).double()(x.double()), expected, EPSILON[torch.float32])
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert ours.weight.grad.dtype == torch.float32
    with torch.autocast(device.type, dtype), torch.autocast(device.type, enabled=False):
        assert ours(x).dtype == torch.float32


def test_state_dicts_are_interchangeable():
    theirs = torch.nn.Linear(33, 20)
    ours = Linear(33, 20, activation="gelu")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, torch.nn.Linear)


def test_same_initial_values():
    torch.manual_seed(3)
    theirs = torch.nn.Linear(33, 20)
    torch.manual_seed(3)
    ours = Linear(33, 20)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_from_linear_keeps_what_a_layer_of_ours_does():
    layer = Linear(3, 2, activation="silu", fuse_wgrad_accumulation=True)
    for ours in (Linear.from_linear(layer), Linear.from_linear(layer, "silu")):
        assert (ours.activation, ours.fuse_wgrad_accumulation) == ("silu", True)
    assert Linear.from_linear(torch.nn.Linear(3, 2)).fuse_wgrad_accumulation is False


def test_from_linear_shares_the_parameters():
    theirs = torch.nn.Linear(33, 20, bias=False, dtype=torch.bfloat16).eval()
    ours = Linear.from_linear(theirs, "silu")
    assert ours.weight is theirs.weight
    assert ours.bias is None
    assert not ours.training
    assert (ours.in_features, ours.out_features, ours.activation) == (33, 20, "silu")


def test_copies_and_conversions():
    layer = Linear(33, 20, activation="gelu")
    x = torch.randn(5, 33)
    expected = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.weight is not layer.weight
        assert torch.equal(clone(x), expected)
    layer.half()
    assert layer(x.half()).dtype == torch.float16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_meta_device():
    layer = Linear(33, 20, activation="relu", device="meta", dtype=torch.float16)
    out = layer(torch.empty(2, 5, 33, device="meta", dtype=torch.float16))
    assert out.shape == (2, 5, 20)
    assert out.dtype == torch.float16
    assert layer.to_empty(device="cpu").weight.shape == (20, 33)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compiled_equals_eager(device, activation, autocast):
    layer = Linear(33, 20, activation=activation, device=device, dtype=torch.float32 if autocast else torch.float16)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 7):
        x = torch.randn(2, rows, 33, device=device, dtype=layer.weight.dtype, requires_grad=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out, expected = compiled(x), layer(x)
        assert torch.equal(out, expected)
        leaves = [x, *layer.parameters()]
        for got, eager in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(got, eager)


def test_residual(device):
    theirs, ours = pair(device)
    x = torch.randn(5, 33, device=device).half()
    for residual in (torch.randn(5, 20, device=device).half(), torch.randn(5, 20, device=device)):
        out, expected = ours(x, residual), theirs(x) + residual
        assert out.dtype == expected.dtype
        exact = copy.deepcopy(theirs).double()(x.double()) + residual.double()
        assert_within_budget(out, exact, expected, EPSILON[torch.float32])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(native_device, use_reentrant):
    layer = Linear(33, 20, activation="gelu", device=native_device, dtype=torch.float16)
    x = torch.randn(5, 33, device=native_device).half().requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).sum(), leaves)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert all(map(torch.equal, [leaf.grad for leaf in leaves], expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_weight_gradients_of_two_batches_in_fp32(device, activation, dtype):
    """Both forwards first, as in a pipeline: the buffer changes between a forward and its backward."""
    layer = Linear(33, 20, activation=activation, device=device, dtype=dtype, fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.ones_like(layer.weight, dtype=torch.float32)
    batches = [torch.randn(5, 33, device=device).to(dtype).requires_grad_() for _ in range(2)]
    for out in [layer(x) for x in batches]:
        assert out.shape == (5, 20)
        out.sum().backward()
    function = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}[activation]

    def gradients(x, kind):
        tensors = [tensor.detach().to(kind).requires_grad_() for tensor in (x, layer.weight, layer.bias)]
        return torch.autograd.grad(function(F.linear(*tensors)).sum(), tensors[:2])

    truth = torch.ones_like(layer.weight, dtype=torch.float64)
    own = torch.ones_like(layer.weight, dtype=torch.float32)
    for x in batches:
        (grad_x, grad_weight), (own_x, own_weight) = (gradients(x, kind) for kind in (torch.float64, dtype))
        truth += grad_weight
        own += own_weight
        assert_within_budget(x.grad, grad_x, own_x, EPSILON[dtype])
    assert layer.weight.grad is None
    assert layer.bias.grad.dtype == dtype
    assert_within_budget(layer.weight.main_grad, truth, own, EPSILON[torch.float32])


def test_weight_gradient_under_autocast_goes_to_main_grad(native_device):
    layer = Linear(33, 20, device=native_device, fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    x = torch.randn(5, 33, device=native_device)
    with torch.autocast(native_device.type, torch.bfloat16):
        layer(x).float().sum().backward()
        with torch.no_grad():
            layer(x)
    assert layer.weight.grad is None
    exact, own = (x.bfloat16().to(kind).sum(0).expand(20, 33) for kind in (torch.float64, torch.float32))
    assert_within_budget(layer.weight.main_grad, exact, own, EPSILON[torch.float32])


def test_main_grad_compiled(native_device):
    layer = Linear(33, 20, device=native_device, dtype=torch.float16, fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    torch.compiler.reset()
    x = torch.randn(5, 33, device=native_device).half()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    compiled = layer.weight.main_grad.clone()
    layer.weight.main_grad.zero_()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.main_grad, compiled)
    assert compiled.any()


def test_a_step_with_main_grad_is_a_step_with_the_gradient(native_device):
    layers = [Linear(33, 20, False, device=native_device, dtype=torch.float16) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].fuse_wgrad_accumulation = True
    layers[1].weight.main_grad = torch.zeros_like(layers[1].weight, dtype=torch.float32)
    x = torch.ones(4, 33, device=native_device).half()
    optimizers = [AdamW(layer.parameters(), lr=1e-2) for layer in layers]
    for layer in layers:
        layer(x).sum().backward()
    optimizers[1].main_grads = {layers[1].weight: layers[1].weight.main_grad}
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_main_grad_refused(native_device):
    layer = Linear(33, 20, device=native_device, dtype=torch.float16, fuse_wgrad_accumulation=True)
    x = torch.zeros(5, 33, device=native_device).half()
    with pytest.raises(ValueError, match=r"no main_grad; set weight.main_grad = torch.zeros_like"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (5, 20)
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="accumulate_into has no second derivative"):
        torch.autograd.grad(layer(x).sum(), layer.bias, create_graph=True)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    with pytest.raises(TypeError, match=r"accumulate_into is torch.float16; it must be torch.float32"):
        layer(x)
    layer.weight.main_grad = torch.zeros(33, 20, device=native_device)
    with pytest.raises(ValueError, match=r"accumulate_into has shape \(20, 33\).*must be \(33, 20\)"):
        layer(x)


def test_representation():
    assert repr(Linear(3, 2, activation="gelu")) == (
        "Linear(in_features=3, out_features=2, bias=True, activation='gelu')"
    )
    assert repr(Linear(3, 2)) == repr(torch.nn.Linear(3, 2))


def test_refused():
    with pytest.raises(ValueError, match=r"activation must be None or .*gelu_tanh.* it is 'tanh'"):
        Linear(3, 2, activation="tanh")
    with pytest.raises(ValueError, match="it is 'swish'"):
        Linear.from_linear(torch.nn.Linear(3, 2), "swish")
    with pytest.raises(ValueError, match="activation is 'gelu' and linear has 'silu'"):
        Linear.from_linear(Linear(3, 2, activation="silu"), "gelu")
    with pytest.raises(TypeError, match="linear is a Conv1d"):
        Linear.from_linear(torch.nn.Conv1d(3, 2, 1))
    layer = Linear(3, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"input has shape \(5, 4\) and weight \(2, 3\)"):
        layer(torch.zeros(5, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"input has shape \(\)"):
        layer(torch.zeros((), dtype=torch.float16))
    with pytest.raises(TypeError, match=r"input is torch.float32 and weight is torch.float16"):
        layer(torch.zeros(5, 3))


@pytest.mark.parametrize("make", [Linear, MLP, QuantLinear])
def test_an_input_that_is_no_tensor_is_refused(make):
    with pytest.raises(TypeError, match=r"input must be a torch.Tensor; it is a list"):
        make(4, 4)([[1.0, 2.0, 3.0, 4.0]])
