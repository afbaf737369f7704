"""quantize_ and dequantize_ on models: what they take, what they leave and why, and that nothing is half-changed."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import mixft
from mixft.nn import Linear, QuantLinear
from mixft.nn.quantization import choose_layers


class Model(nn.Module):
    """An embedding tied to its head, a shared layer, a small layer, attention, and plain layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(150, 128)
        self.first = nn.Linear(128, 256)
        self.second = nn.Linear(256, 128, bias=False)
        self.again = self.first
        self.small = nn.Linear(128, 8)
        self.attention = nn.MultiheadAttention(128, 4)
        self.classifier = nn.Linear(128, 200)
        self.tied = nn.Linear(128, 150)
        self.tied.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.second(self.again(self.second(torch.relu(self.first(self.embedding(tokens))))))
        return self.classifier(x), self.tied(x)


def test_what_is_quantized_and_what_is_left():
    model = Model()
    first = model.first
    report = mixft.quantize_(model)
    assert [layer.name for layer in report.quantized] == ["first", "second"]
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons["small"] == "too small to gain, (8, 128)"
    assert reasons["classifier"] == "an output head"
    assert reasons["tied"] == "its weight is shared with another module"
    assert "a subclass of nn.Linear" in reasons["attention.out_proj"]
    assert isinstance(model.first, QuantLinear)
    assert model.again is model.first
    assert model.first.bias is first.bias
    assert model.tied.weight is model.embedding.weight
    (layer, _) = report.quantized
    assert layer.bytes_before == 4 * (128 * 256 + 256)
    assert layer.bytes_after == 128 * 256 + 4 * 256 + 4 * 256
    assert 0.001 < layer.error < 0.02
    assert re.search(r"2 of 6 layers in mode 'dynamic': [\d,]+ -> [\d,]+ bytes$", str(report))
    assert "first" in str(report)


def test_quantized_model_computes_nearly_the_same():
    model = Model().eval()
    tokens = torch.randint(0, 150, (3, 7))
    with torch.no_grad():
        expected = model(tokens)[0]
        mixft.quantize_(model)
        assert (model(tokens)[0] - expected).norm() < 0.05 * expected.norm()


def test_include_and_exclude():
    model = Model()
    report = mixft.quantize_(model, include=["classifier", "f*"], exclude="first")
    assert [layer.name for layer in report.quantized] == ["classifier"]
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons["second"] == "not in include"
    assert reasons["first"] == "in exclude"


def test_train_mode_shares_parameters_and_can_become_dynamic():
    model = Model()
    parameters = dict(model.named_parameters())
    mixft.quantize_(model, mode="train")
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    report = mixft.quantize_(model, mode="dynamic")
    assert [layer.name for layer in report.quantized] == ["first", "second"]
    assert model.first.weight.dtype == torch.int8
    with pytest.raises(ValueError, match="dequantize_ the model first"):
        mixft.quantize_(model, mode="train", include="first")


def test_dequantize_gives_plain_layers_back():
    model = Model()
    model.first = Linear(128, 256, activation="gelu")
    model.again = model.first
    weight = model.second.weight.detach().clone()
    mixft.quantize_(model)
    assert mixft.dequantize_(model) == ["first", "second"]
    assert type(model.second) is nn.Linear
    assert type(model.first) is Linear
    assert model.first.activation == "gelu"
    assert model.again is model.first
    bound = weight.abs().amax(1, keepdim=True) / 254 * 1.001
    assert ((model.second.weight - weight).abs() <= bound).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "int4"}, ValueError, "mode must be one of weight_only, dynamic, train; it is 'int4'"),
        ({"include": "nothing*"}, ValueError, r"include pattern 'nothing\*' matches none of the linear layers"),
        ({"exclude": ["first", "typo"]}, ValueError, "exclude pattern 'typo' matches none"),
        ({"include": "attention.out_proj"}, ValueError, "no layer to quantize"),
        ({"model": nn.Linear(4, 4)}, ValueError, "model is itself a linear layer"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "it has no linear layers"),
        ({"model": [nn.Linear(4, 4)]}, TypeError, "model must be a torch.nn.Module; it is a list"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(arguments, error, message):
    model = arguments.pop("model", None) or Model()
    before = list(model.modules()) if isinstance(model, nn.Module) else model
    with pytest.raises(error, match=message):
        mixft.quantize_(model, **arguments)
    assert not isinstance(model, nn.Module) or list(model.modules()) == before


def test_a_model_of_many_layers_is_refused_in_one_line():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)), nn.Linear(8, 4))
    small = r"'0' and 99 more: too small to gain, \(8, 8\); '100': too small to gain, \(4, 8\)"
    with pytest.raises(ValueError, match=rf"no layer to quantize \({small}\)$"):
        mixft.quantize_(model)
    with pytest.raises(ValueError, match=r"matches none of the linear layers: \*$"):
        mixft.quantize_(model, exclude="typo")


def walks_to_choose(model, monkeypatch):
    """How often the choice of layers goes over all modules of ``model``."""
    walks = []
    walk = nn.Module.named_modules
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", lambda self, *a, **k: walks.append(self) or walk(self, *a, **k))
        choose_layers(model)
    return walks.count(model)


def test_a_model_of_many_layers_is_walked_no_more_often_than_one_of_few(monkeypatch):
    """A mixture of experts has tens of thousands of layers."""
    few, many = (nn.Sequential(*(nn.Linear(128, 128, device="meta") for _ in range(n))) for n in (3, 50))
    assert walks_to_choose(many, monkeypatch) == walks_to_choose(few, monkeypatch) > 0


def test_a_name_in_full_is_not_taken_for_a_glob():
    model = nn.ModuleDict({name: nn.Linear(128, 128) for name in ("a[1]", "a1", "b")})
    reasons = choose_layers(model, include=["a[1]", "b"])
    assert [name for name, reason in reasons.items() if not reason] == ["a[1]", "b"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["dynamic", "train"])
def test_a_layer_with_non_finite_weights_is_named_and_nothing_changes(bad, mode):
    model = Model()
    model.second.weight.data[3, 4] = bad
    before = list(model.modules())
    with pytest.raises(ValueError, match="layer 'second' holds NaN or Inf"):
        mixft.quantize_(model, mode)
    assert list(model.modules()) == before


def test_layers_that_cannot_be_quantized_are_left_with_a_reason():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128).double(), nn.Linear(128, 128, device="meta"))
    model.append(nn.Linear(128, 128))
    model[3].register_forward_hook(lambda *arguments: None)
    for mode in ("train", "dynamic"):
        report = mixft.quantize_(model, mode)
        assert [layer.name for layer in report.quantized] == ["0"]
    reasons = [layer.reason for layer in report.left]
    assert reasons[0] == "its weight is torch.float64"
    assert "meta device" in reasons[1]
    assert "hooks" in reasons[2]


def test_hooks_outlive_another_mode_and_dequantize():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    mixft.quantize_(model, "train")
    seen = []
    handle = model[0].register_forward_hook(
        lambda module, args, kwargs, out: seen.append(type(module)), with_kwargs=True
    )
    model[0].register_full_backward_hook(lambda *arguments: seen.append("backward"))
    (left,) = mixft.quantize_(model, "dynamic").left
    assert (left.name, left.reason) == ("0", "it has hooks, which a replacement would lose")
    mixft.dequantize_(model)
    model(torch.randn(2, 128, requires_grad=True)).sum().backward()
    assert seen == [nn.Linear, "backward"]
    handle.remove()
    model(torch.randn(2, 128))
    assert len(seen) == 2


def test_a_layer_with_a_forward_of_its_own_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[0].forward = model[0].forward
    (left,) = mixft.quantize_(model).left
    assert (left.name, "its forward was replaced" in left.reason) == ("0", True)
    model[1].forward = model[1].forward
    with pytest.raises(ValueError, match="the forward of layer '1' was replaced on the layer itself"):
        mixft.dequantize_(model)
    assert isinstance(model[1], QuantLinear)


@pytest.fixture
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def encoder_and_input():
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(128, 128)).eval(), torch.randn(3, 7, 128)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_a_transformer_encoder_that_reads_its_weights_computes_nearly_the_same(mode):
    model, x = encoder_and_input()
    with torch.no_grad():
        expected = model(x)
        report = mixft.quantize_(model, mode)
        assert (model(x) - expected).norm() < 0.05 * expected.norm()
    left = {layer.name: layer.reason for layer in report.left}
    assert ("0.layers.0.linear1" in left) == (mode != "train")
    assert mode == "train" or "set_fastpath_enabled" in left["0.layers.1.linear2"]


def test_a_transformer_encoder_is_taken_where_its_fast_path_is_off(without_fast_path):
    model, x = encoder_and_input()
    with torch.no_grad():
        expected = model(x)
        quantized = [layer.name for layer in mixft.quantize_(model).quantized]
        assert (model(x) - expected).norm() < 0.05 * expected.norm()
    assert quantized == [*(f"0.layers.{block}.linear{part}" for block in (0, 1) for part in (1, 2)), "1"]


def test_attention_whose_output_layer_was_replaced_computes_the_same():
    model = nn.Sequential(nn.Linear(128, 128), nn.MultiheadAttention(128, 4))
    model[1].out_proj = nn.Linear(128, 128)
    (left,) = mixft.quantize_(model).left
    assert (left.name, left.reason) == ("1.out_proj", "nn.MultiheadAttention reads its weight")


def test_a_layer_that_waits_for_its_first_input_is_left():
    model = nn.Sequential(nn.Linear(128, 128), nn.LazyLinear(128))
    (left,) = mixft.quantize_(model).left
    assert (left.reason, left.bytes_before) == ("a subclass of nn.Linear, LazyLinear", 0)
    assert mixft.model_report(model).layers[1].bytes == 0


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1.0, 1e25, 1e37])
def test_the_error_of_weights_whose_squares_fp32_does_not_hold(size):
    """Down to FP32's denormal numbers, of which one near the smallest holds few bits."""
    model = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        model[0].weight.uniform_(-1, 1)
        model[0].weight *= size
    (layer,) = mixft.quantize_(model).quantized
    weight, found = model[0].dequantized_weight().double(), model[0].to_linear().weight.double()
    assert torch.equal(weight, found)
    assert 0.001 < layer.error < 0.01 or size == 1e-40


def test_a_row_of_zeros_beside_others_stays_zero():
    model = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        model[0].weight[3] = 0
    mixft.quantize_(model)
    assert not model[0].dequantized_weight()[3].any()
    assert torch.equal(model(torch.randn(5, 128))[:, 3], model[0].bias[3].expand(5))


def test_a_pattern_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"include must be a glob or several; it is \[3\]"):
        mixft.quantize_(Model(), include=[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantized_weights_have_the_dtype_that_they_came_from(dtype):
    model = nn.Sequential(nn.Linear(128, 128, bias=False)).to(dtype)
    mixft.quantize_(model)
    mixft.dequantize_(model)
    assert model[0].weight.dtype == dtype
    mixft.quantize_(model)
    mixft.dequantize_(model.half())
    assert model[0].weight.dtype == torch.float16


def test_the_choice_of_layers_needs_no_weights():
    with torch.device("meta"):
        chosen = choose_layers(Model(), exclude="*second")
    report = mixft.quantize_(Model(), exclude="*second")
    assert chosen == {layer.name: layer.reason for layer in report.layers}
    assert {"", "in exclude", "its weight is shared with another module"} <= set(chosen.values())


@pytest.mark.parametrize(
    "journey", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("modes", [["dynamic"], ["weight_only"], ["train"], ["train", "dynamic"]])
def test_frozen_weights_come_back_frozen_and_others_do_not(modes, journey):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), Linear(128, 128, activation="relu"))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    for mode in modes:
        mixft.quantize_(model, mode)
    model = journey(model)
    mixft.dequantize_(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True, False, False]


def test_a_layer_that_was_made_from_none_gives_a_weight_that_trains():
    assert QuantLinear(128, 128).to_linear().weight.requires_grad
