"""A LoRA adapter inside the products of a frozen int8 layer: values and gradients, and which layers take the way."""

import copy

import pytest
import torch
from conftest import assert_within_budget
from huggingface_models import llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PlainLora
from torch import nn
from torch._subclasses import FakeTensorMode

import mixft
from mixft.huggingface import lora as adapters
from mixft.nn import QuantLinear
from mixft.nn.noise_guard import GPU_LAG
from mixft.ops import dynamic_int8_linear, lora_int8_linear
from mixft.ops.int8_input_gradient import input_gradient

SHAPES = [(1, 1, 1, 1), (3, 66, 17, 2), (17, 31, 66, 8), (26, 130, 70, 5), (0, 8, 4, 2), (3, 7, 0, 2)]


def operands(shape, dtype=torch.float32, device="cpu"):
    M, K, N, rank = shape
    x, a, b = (torch.randn(size, device=device).to(dtype) for size in ((M, K), (rank, K), (N, rank)))
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8).to(device)
    bias = torch.randn(N, device=device).to(dtype)
    for leaf in (x, bias, a, b):
        leaf.requires_grad_()
    return x, weight, torch.rand(N, 1, device=device) / 100, bias, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_parts_in_fp64(native_device, shape, dtype):
    x, weight, scale, bias, a, b = operands(shape, dtype, native_device)
    out = lora_int8_linear(x, weight, scale, bias, a, b, 0.5)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (x, a, b), grad))
    # What int8 gives without an adapter, taken as exact, so that the budget is that of the rest.
    base = dynamic_int8_linear(x.detach().float(), weight, scale, bias.detach())
    through = input_gradient(grad.float(), weight, scale, "int8")

    def reference(to):
        rows, left, right, g = (tensor.detach().to(to) for tensor in (x, a, b, grad))
        h, g_left = 0.5 * (rows @ left.t()), 0.5 * (g @ right)
        return base.to(to) + h @ right.t(), through.to(to) + g_left @ left, g_left.t() @ rows, g.t() @ h

    for actual, exact, torch_s in zip(found, reference(torch.float64), reference(dtype), strict=True):
        epsilon = 2**-20 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert_within_budget(actual, exact.cpu(), torch_s, epsilon)
    bias_grad = torch.autograd.grad(lora_int8_linear(x, weight, scale, bias, a, b, 0.5), bias, grad)[0]
    assert_within_budget(bias_grad, grad.double().cpu().sum(0), grad.sum(0), 2**-20)


@pytest.mark.parametrize("backward", ["int8", "16bit", "exact"])
def test_the_gradient_of_the_input_runs_in_what_was_asked_for(native_device, backward):
    x, weight, scale, bias, a, b = operands((9, 66, 34, 3), device=native_device)
    out = lora_int8_linear(x, weight, scale, bias, a, b, 2.0, backward=backward)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    expected = input_gradient(grad, weight, scale, backward) + 2.0 * (grad @ b) @ a
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-4)


def test_autocast_around_fp32_operands_changes_nothing(native_device):
    tensors = operands((9, 66, 34, 3), device=native_device)
    found = []
    for enabled in (False, True):
        with torch.autocast(native_device.type, torch.bfloat16, enabled=enabled):
            out = lora_int8_linear(*tensors, 2.0)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backward", ["int8", "exact"])
def test_a_compiler_sees_the_parts(native_device, backward):
    tensors = operands((9, 66, 34, 3), device=native_device)

    def call(*tensors):
        return lora_int8_linear(*tensors, 2.0, backward=backward)

    torch.compiler.reset()
    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = (torch.autograd.grad(result.sum(), leaves) for result in (out, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        assert call(*fakes).shape == (9, 34)


def test_bits_do_not_depend_on_the_threads(one_thread, without_interpreter):
    tensors = operands((40, 500, 70, 9))
    alone = lora_int8_linear(*tensors, 2.0)
    for count in (2, 5):
        torch.set_num_threads(count)
        torch.testing.assert_close(lora_int8_linear(*tensors, 2.0), alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.randn(3, 7)}, ValueError, r"a has shape \(3, 7\)"),
        ({"b": torch.randn(5, 2)}, ValueError, r"b \(5, 2\)"),
        ({"b": torch.randn(5, 3).half()}, TypeError, "a and b must be of the dtype of x"),
        ({"backward": "weight_grad_16bit"}, ValueError, "backward must be one of int8, 16bit, exact"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    names = ("x", "weight", "weight_scale", "bias", "a", "b")
    arguments = dict(zip(names, operands((4, 8, 5, 3)), strict=True)) | {"scaling": 1.0} | change
    with pytest.raises(error, match=message):
        lora_int8_linear(**arguments)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.dense = QuantLinear.from_linear(nn.Linear(66, 50), **options)

    def forward(self, x):
        return self.dense(x)


def adapted(device, **settings):
    options = settings.pop("options", {})
    model = get_peft_model(
        Model(**options).to(device), LoraConfig(r=3, lora_alpha=6, target_modules=["dense"], **settings)
    )
    nn.init.normal_(model.base_model.model.dense.lora_B["default"].weight, std=0.05)
    return model, model.base_model.model.dense


@pytest.fixture
def calls(monkeypatch):
    """How many layers took the way through the products."""
    found = []

    def counted(*arguments, **options):
        found.append(arguments)
        return lora_int8_linear(*arguments, **options)

    monkeypatch.setattr(adapters, "lora_int8_linear", counted)
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_of_peft_gives_what_its_own_code_gives(native_device, calls, autocast):
    model, layer = adapted(native_device)
    x = torch.randn(2, 9, 66, device=native_device, requires_grad=True)

    def results(run):
        with torch.autocast(native_device.type, torch.bfloat16, enabled=autocast):
            out = run(x)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return out, *torch.autograd.grad(out.float().square().sum(), (x, *parameters))

    found = results(model)
    assert len(calls) == 1
    expected = results(lambda rows: PlainLora.forward(layer, rows))
    assert len(calls) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 2e-2 if autocast else 1e-2  # the gradient of a slightly other output is quantized
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_layer_measures_its_gradient(native_device, calls):
    model, layer = adapted(native_device)
    passes = 1 + (GPU_LAG if native_device.type == "cuda" else 1)
    for _ in range(passes):
        model(torch.randn(40, 66, device=native_device, requires_grad=True)).square().sum().backward()
    assert len(calls) == passes
    assert layer.base_layer.guard.sqnr["gradient"] > 20


@pytest.mark.parametrize(
    "reason", ["weight_only", "outliers", "dropout", "disabled", "merged", "two", "hooked", "16-bit input"]
)
def test_other_layers_take_peft_s_own_way(native_device, calls, reason):
    options = {"weight_only": {"mode": "weight_only"}, "outliers": {"outlier_threshold": 6.0}}.get(reason, {})
    model, layer = adapted(native_device, options=options, **({"lora_dropout": 0.5} if reason == "dropout" else {}))
    x = torch.randn(9, 66, device=native_device)
    if reason == "disabled":
        layer.enable_adapters(False)
    elif reason == "merged":
        layer.merge()
    elif reason == "two":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["dense"]))
        layer.set_adapter(["default", "second"])
    elif reason == "hooked":
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    model(x.bfloat16() if reason == "16-bit input" else x)
    assert not calls
    if reason == "dropout":
        model.eval()
        model(x)
        assert len(calls) == 1


def test_the_graph_keeps_the_input_once_and_no_copy_of_the_weight(native_device, calls):
    model, layer = adapted(native_device)
    x = torch.randn(40, 66, device=native_device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    large = [tensor for tensor in kept if tensor.numel() >= 40 * 50]
    assert sorted(tensor.data_ptr() for tensor in large) == sorted((x.data_ptr(), layer.base_layer.weight.data_ptr()))


def test_adapters_train_to_the_loss_of_exact_gradients(native_device, one_thread):
    torch.manual_seed(3)
    base, tokens = llama(), torch.randint(0, 150, (4, 12), device=native_device)
    losses = {}
    for backward in ("int8", "16bit", "exact"):
        model = copy.deepcopy(base)
        mixft.quantize_(model, backward=backward)
        torch.manual_seed(4)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).to(native_device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = mixft.optim.AdamW(trained, lr=5e-3)
        for _ in range(8):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[backward] = loss.item()
    first = base.to(native_device)(input_ids=tokens, labels=tokens).loss.item()
    assert losses["exact"] < first - 0.3
    for backward in ("int8", "16bit"):
        assert abs(losses[backward] - losses["exact"]) < 0.05 * (first - losses["exact"])
