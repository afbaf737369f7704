"""``mixft.ops.mlp`` and ``mixft.nn.MLP`` against FP64 and torch's own layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, assert_within_budget
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import mixft
from mixft.nn import MLP, Linear
from mixft.ops import mlp

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def tensors(rows, dtype, device, lead=(), sizes=(33, 48, 21)):
    """x, both layers' weights and biases, and a residual."""
    inner, hidden, outer = sizes
    shapes = [(*lead, rows, inner), (hidden, inner), (hidden,), (outer, hidden), (outer,), (*lead, rows, outer)]
    return [
        (torch.randn(shape, device=device) / (shape[-1] ** 0.5 if number in (1, 3) else 1)).to(dtype)
        for number, shape in enumerate(shapes)
    ]


def plain(x, weight1, bias1, weight2, bias2, residual, activation):
    out = F.linear(ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)
    return out if residual is None else out + residual


def ours(x, weight1, bias1, weight2, bias2, residual, activation):
    return mlp(x, weight1, bias1, weight2, bias2, activation, residual=residual)


def outputs_and_gradients(function, inputs, activation, cotangent):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, activation)
    given = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad((out.double() * cotangent).sum(), given)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("rows", [1, 37])
def test_forward_and_backward(device, rows, dtype, activation):
    inputs = tensors(rows, dtype, device, lead=(2,))
    cotangent = torch.randn(2, rows, 21, device=device).to(dtype).double()
    actual = outputs_and_gradients(ours, inputs, activation, cotangent)
    truth = outputs_and_gradients(plain, [x.double() for x in inputs], activation, cotangent)
    same = outputs_and_gradients(plain, [x.cpu() for x in inputs], activation, cotangent.cpu())
    for got, exact, own in zip(actual, truth, same, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, exact, own, EPSILON[dtype])


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4, 5)])
def test_without_biases_or_residual(device, missing):
    inputs = [None if number in missing else x for number, x in enumerate(tensors(9, torch.float16, device))]
    cotangent = torch.randn(9, 21, device=device).half().double()
    actual = outputs_and_gradients(ours, inputs, "gelu", cotangent)
    truth = outputs_and_gradients(plain, [None if x is None else x.double() for x in inputs], "gelu", cotangent)
    same = outputs_and_gradients(plain, [None if x is None else x.cpu() for x in inputs], "gelu", cotangent.cpu())
    for got, exact, own in zip(actual, truth, same, strict=True):
        assert_within_budget(got, exact, own, EPSILON[torch.float16])


@pytest.mark.parametrize("dtype", EPSILON)
def test_a_unit_that_relu_left_at_zero_passes_no_infinity(device, dtype):
    x, weight1, bias1, weight2, bias2, _ = tensors(9, dtype, device)
    bias1[:40] = -100
    leaves = [leaf.requires_grad_() for leaf in (x, weight1, bias1)]
    out = mlp(*leaves, weight2, bias2, "relu")
    _, grad_weight, grad_bias = torch.autograd.grad(out, leaves, torch.full_like(out, torch.inf))
    assert grad_weight[:40].count_nonzero() == 0
    assert grad_bias[:40].count_nonzero() == 0


def test_biases_and_residual_in_fp32(device):
    inputs = tensors(9, torch.bfloat16, device)
    for number in (2, 4, 5):
        inputs[number] = inputs[number].float() * 1.0009765625
    actual = outputs_and_gradients(ours, inputs, "silu", torch.ones(9, 21, device=device).double())
    x, weight1, bias1, weight2, bias2, residual = inputs
    exact = plain(*(tensor.double() for tensor in inputs), "silu")
    hidden = F.silu(F.linear(x.float(), weight1.float(), bias1)).bfloat16()
    own = F.linear(hidden.float(), weight2.float(), bias2) + residual
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]
    assert actual[0].dtype == torch.float32
    assert_within_budget(actual[0], exact, own, EPSILON[torch.float32])
    assert torch.equal(actual[6], torch.ones_like(actual[6]))


@pytest.mark.parametrize("shape", [(0, 33, 48, 21), (3, 33, 0, 21), (3, 0, 48, 21)])
def test_empty(device, shape):
    rows, *sizes = shape
    inputs = tensors(rows, torch.float16, device, sizes=sizes)
    cotangent = torch.ones(rows, sizes[2], device=device).double()
    actual = outputs_and_gradients(ours, inputs, "gelu", cotangent)
    truth = outputs_and_gradients(plain, [x.double() for x in inputs], "gelu", cotangent)
    same = outputs_and_gradients(plain, [x.cpu() for x in inputs], "gelu", cotangent.cpu())
    for got, exact, own in zip(actual, truth, same, strict=True):
        assert_within_budget(got, exact, own, EPSILON[torch.float16])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("frozen", range(6))
def test_any_tensor_may_be_frozen(native_device, frozen, activation):
    inputs = tensors(5, torch.float32, native_device)
    leaves = [x.requires_grad_(number != frozen) for number, x in enumerate(inputs)]
    doubled = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]

    def gradients(function, tensors):
        wanted = [leaf for leaf in tensors if leaf.requires_grad]
        return torch.autograd.grad(function(*tensors, activation).square().sum(), wanted)

    for got, exact, own in zip(
        gradients(ours, leaves), gradients(plain, doubled), gradients(plain, leaves), strict=True
    ):
        assert_within_budget(got, exact, own, EPSILON[torch.float32])


def test_only_what_gradients_need_is_kept(native_device):
    x, weight1, bias1, weight2, bias2, _ = tensors(5, torch.float16, native_device)
    out = mlp(x, weight1, bias1, weight2.requires_grad_(), bias2)
    assert [kept is None for kept in out.grad_fn.saved_tensors] == [True, True, True, False, True]
    weight2.requires_grad_(False)
    out = mlp(x.requires_grad_(), weight1, bias1, weight2, bias2, "relu")
    assert [kept is None for kept in out.grad_fn.saved_tensors] == [True, False, False, True, False]
    with torch.no_grad():
        assert not mlp(x, weight1, bias1, weight2, bias2).requires_grad


def test_same_bits_on_every_run(device):
    inputs = tensors(40, torch.bfloat16, device)
    cotangent = torch.ones(40, 21, device=device).double()
    first, second = (outputs_and_gradients(ours, inputs, "gelu", cotangent) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_not_a_number_reaches_every_gradient_that_it_must(device):
    inputs = tensors(5, torch.float16, device)
    inputs[0][2, 3] = float("nan")
    gradients = outputs_and_gradients(ours, inputs, "gelu", torch.ones(5, 21, device=device).double())
    out, grad_x, grad_weight1, grad_bias1, grad_weight2, _, _ = gradients
    assert out[2].isnan().all()
    assert out[:2].isfinite().all()
    assert grad_x[2].isnan().all()
    assert all(grad.isnan().all() for grad in (grad_weight1, grad_bias1, grad_weight2))


def test_a_second_derivative_is_refused(native_device):
    inputs = [x.requires_grad_() for x in tensors(3, torch.float32, native_device)]
    with pytest.raises(RuntimeError, match="mlp has no second derivative"):
        torch.autograd.grad(ours(*inputs, "gelu").sum(), inputs[0], create_graph=True)


HALF = tensors(3, torch.float16, "cpu")


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"x": HALF[0].float()}, TypeError, "weight1 must be torch.float32; it is torch.float16"),
        ({"x": HALF[0][:, 1:]}, ValueError, r"x has shape \(3, 32\), weight1 \(48, 33\)"),
        ({"weight2": HALF[3].float()}, TypeError, "weight2 must be torch.float16; it is torch.float32"),
        ({"weight2": HALF[3][:, 1:]}, ValueError, r"weight1 \(48, 33\) and weight2 \(21, 47\)"),
        ({"weight1": HALF[1].to("meta")}, ValueError, "x on cpu, weight1 on meta"),
        ({"bias1": HALF[4]}, ValueError, r"bias1 has shape \(21,\); it must be \(48,\)"),
        ({"bias2": HALF[4].bfloat16()}, TypeError, "bias2 is torch.bfloat16"),
        ({"residual": HALF[5][1:]}, ValueError, r"residual has shape \(2, 21\); it must be \(3, 21\)"),
        ({"residual": HALF[5].to("meta")}, ValueError, "residual is on meta"),
        ({"activation": "tanh"}, ValueError, "it is 'tanh'"),
        ({"activation": None}, ValueError, "activation is None"),
    ],
)
def test_refused(changed, kind, message):
    names = ("x", "weight1", "bias1", "weight2", "bias2", "residual")
    with pytest.raises(kind, match=message):
        mlp(**{**dict(zip(names, HALF, strict=True)), **changed})


def block(dtype=torch.float16, activation="gelu", device="cpu"):
    return MLP(33, 48, 21, activation=activation, device=device, dtype=dtype)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (1, 33), (2, 5, 33)])
def test_module(native_device, shape):
    layers = torch.nn.Linear(33, 48), torch.nn.Linear(48, 21, bias=False)
    module = MLP.from_linears(*layers, "silu").to(native_device)
    assert module.fc1.weight is layers[0].weight
    x = torch.randn(shape, device=native_device)
    residual = torch.randn(*shape[:-1], 21, device=native_device)

    def plain(first, second, x, residual):
        return second(F.silu(first(x))) + residual

    expected = plain(*layers, x, residual)
    exact = plain(*(copy.deepcopy(layer).double() for layer in layers), x.double(), residual.double())
    assert_within_budget(module(x, residual), exact, expected, EPSILON[torch.float32])
    assert list(module.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(native_device, dtype):
    module = block(torch.float32, device=native_device)
    x = torch.randn(5, 33, device=native_device)
    with torch.autocast(native_device.type, dtype):
        out, stream = module(x), module(x, torch.randn(5, 21, device=native_device))
        expected = F.linear(F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias)), module.fc2.weight, module.fc2.bias)
    assert out.dtype == expected.dtype == dtype
    assert stream.dtype == torch.float32
    exact = copy.deepcopy(module).double()
    assert_within_budget(out, plain_module(exact, x.double()), expected, EPSILON[dtype])
    out.float().sum().backward()
    assert module.fc1.weight.grad.dtype == torch.float32


def plain_module(module, x):
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias))
    return F.linear(hidden, module.fc2.weight, module.fc2.bias)


def test_compiled_equals_eager(native_device):
    module = block(device=native_device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (5, 7):
        x = torch.randn(2, rows, 33, device=native_device).half().requires_grad_()
        leaves = [x, *module.parameters()]
        out, expected = compiled(x), module(x)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(native_device, use_reentrant):
    module = block(device=native_device)
    x = torch.randn(5, 33, device=native_device).half().requires_grad_()
    module(x).sum().backward()
    expected = [x.grad, *(parameter.grad for parameter in module.parameters())]
    x.grad = None
    module.zero_grad()
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    assert all(map(torch.equal, [x.grad, *(parameter.grad for parameter in module.parameters())], expected))


def test_copies_and_conversions():
    module = block(torch.float32, "relu")
    x = torch.randn(5, 33)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), module(x))
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert block(device="meta")(torch.empty(2, 33, device="meta").half()).shape == (2, 21)
    assert MLP(33, 48).fc2.out_features == 33


def layer_by_layer(module, x, residual=None):
    out = module.fc2(module.fc1(x))
    return out if residual is None else out + residual


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_int8_layers_of_a_block_are_called(mode):
    module = MLP(256, 256, dtype=torch.float32)
    x, residual = torch.randn(300, 256), torch.randn(300, 256)
    exact = module(x, residual)
    model = torch.nn.Sequential(module)
    assert len(mixft.quantize_(model, mode).quantized) == 2
    with torch.set_grad_enabled(mode == "train"):
        out = module(x, residual)
        assert torch.equal(out, layer_by_layer(module, x, residual))
    assert not torch.equal(out, exact)
    noise = (out - exact).square().sum() / exact.square().sum()
    assert -10 * noise.log10() > 30  # decibels, as of one layer


def test_a_layer_of_a_block_in_another_precision(device):
    model = torch.nn.Sequential(MLP(33, 48, 21, device=device, dtype=torch.float32))
    mixft.PrecisionPolicy({"*": "fp16", "*fc2": "fp32"}).apply(model)
    x, residual = torch.randn(5, 33, device=device), torch.randn(5, 21, device=device)
    assert [layer.weight.dtype for layer in (model[0].fc1, model[0].fc2)] == [torch.float16, torch.float32]
    out = model(x)
    fc1, fc2 = model[0].fc1, model[0].fc2
    exact = plain_module(copy.deepcopy(model[0]).double(), x.double())
    own = F.linear(F.gelu(F.linear(x.half(), fc1.weight, fc1.bias)).float(), fc2.weight, fc2.bias)
    assert_within_budget(out, exact, own, EPSILON[torch.float16])
    assert_within_budget(model[0](x, residual), exact + residual.double(), own + residual, EPSILON[torch.float16])
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_hangs_on_a_layer_of_a_block_runs():
    module, x = block(torch.float32), torch.randn(5, 33)
    exact, own = plain_module(copy.deepcopy(module).double(), x.double()), plain_module(module, x)
    called = []
    hook = module.fc1.register_forward_hook(lambda layer, inputs, out: called.append(layer))
    assert_within_budget(module(x), exact, own, EPSILON[torch.float32])
    assert called == [module.fc1]
    hook.remove()
    prune.l1_unstructured(module.fc2, "weight", amount=0.5)
    assert torch.equal(module(x), layer_by_layer(module, x))
    prune.remove(module.fc2, "weight")
    module.fc2.forward = lambda hidden: hidden.sum(-1)
    assert module(x).shape == (5,)


def test_weight_gradients_of_a_block_are_added_to_main_grad():
    layers = Linear(33, 48, activation="gelu", fuse_wgrad_accumulation=True), torch.nn.Linear(48, 21)
    module, x = MLP.from_linears(*layers), torch.randn(5, 33)
    module.fc1.weight.main_grad = torch.zeros(48, 33)
    module(x).sum().backward()
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    plain_module(plain, x).sum().backward()
    plain_module(exact, x.double()).sum().backward()
    assert module.fc1.weight.grad is None
    found = module.fc1.weight.main_grad
    assert_within_budget(found, exact.fc1.weight.grad, plain.fc1.weight.grad, EPSILON[torch.float32])


def test_module_refused():
    with pytest.raises(ValueError, match="activation is None"):
        MLP(3, 4, activation=None)
    with pytest.raises(ValueError, match="fc1 gives 4 features and fc2 takes 5"):
        MLP.from_linears(torch.nn.Linear(3, 4), torch.nn.Linear(5, 2))
    with pytest.raises(TypeError, match="linear is a Conv1d"):
        MLP.from_linears(torch.nn.Linear(3, 4), torch.nn.Conv1d(3, 2, 1))
    with pytest.raises(ValueError, match=r"input has shape \(5, 4\) and weight \(48, 33\)"):
        block()(torch.zeros(5, 4).half())
    with pytest.raises(TypeError, match=r"input is torch.float32 and weight is torch.float16"):
        block()(torch.zeros(5, 33))
    with pytest.raises(ValueError, match="activation is 'gelu' and linear has 'relu'"):
        MLP.from_linears(Linear(3, 4, activation="relu"), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match="fc2 has activation='relu'"):
        MLP.from_linears(torch.nn.Linear(3, 4), Linear(4, 2, activation="relu"))
    assert isinstance(block().fc1, Linear)
