"""mixft.calibrate: the ranges that it finds, the formula that it chooses, and that a failure changes nothing."""

import pytest
import torch
from torch import nn

import mixft
from mixft.nn import QuantLinear
from mixft.nn.calibration import input_range


class Model(nn.Module):
    """A layer on the input, one behind a ReLU, and one that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(128, 160)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(160, 128)
        self.unused = nn.Linear(128, 128)

    def forward(self, x, scale=1.0):
        return self.second(self.dropout(torch.relu(self.first(x * scale))))


def quantized_model(**options):
    model = Model()
    mixft.quantize_(model, "dynamic", **options)
    return model


def state(model):
    modes = {name: module.mode for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    hooks = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    return modes, hooks, {name: module.training for name, module in model.named_modules()}, set(model.state_dict())


def test_ranges_and_formulas(native_device):
    model = quantized_model().to(native_device)
    batches = [torch.randn(9, 128, device=native_device) for _ in range(3)]
    found = mixft.calibrate(model, batches)
    assert set(found) == {"first", "second"}
    assert model.training
    assert model.dropout.training
    assert [model.first.mode, model.second.mode, model.unused.mode] == ["static", "static", "dynamic"]
    first, second = found["first"], found["second"]
    assert first.low == min(batch.min().item() for batch in batches)
    assert first.high == max(batch.max().item() for batch in batches)
    assert not first.affine
    assert first.zero_point == 0
    assert first.scale == max(-first.low, first.high) / 127
    assert second.affine
    assert second.low == 0
    assert second.zero_point == -128
    assert second.scale == second.high / 255
    assert model.second.input_scale.item() == pytest.approx(second.scale)
    assert torch.equal(model.second.weight_sum, model.second.weight.sum(1, dtype=torch.int32))


def test_a_static_model_computes_nearly_the_same():
    model = Model().eval()
    x = torch.randn(64, 128)
    with torch.no_grad():
        expected = model(x)
        mixft.quantize_(model)
        mixft.calibrate(model, [x])
        assert (model(x) - expected).norm() < 0.03 * expected.norm()


def test_the_three_forms_of_a_batch():
    x = torch.randn(5, 128)
    ranges = [mixft.calibrate(quantized_model(), [batch])["first"] for batch in (x, (x, 1.0), {"x": x, "scale": 1.0})]
    assert ranges[0] == ranges[1] == ranges[2]
    wider = mixft.calibrate(quantized_model(), iter([(x, 1.0), (x, 2.0)]))["first"]
    assert wider.high == 2 * ranges[0].high


def test_a_layer_that_is_given_its_input_by_name():
    class Named(Model):
        def forward(self, x):
            return self.second(input=torch.relu(self.first(input=x)))

    x = torch.randn(5, 128)
    model = Named()
    mixft.quantize_(model)
    found = mixft.calibrate(model, [x])
    assert list(found) == ["first", "second"]
    assert (found["first"].low, found["first"].high) == (x.min().item(), x.max().item())


def test_calibrating_again_replaces_the_scales():
    model = quantized_model()
    mixft.calibrate(model, [torch.randn(5, 128)])
    before = model.first.input_scale.item()
    mixft.calibrate(model, [10 * torch.randn(5, 128)])
    assert model.first.input_scale.item() > 5 * before


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-1.27, 1.27, 0.01, 0),
        (0.0, 2.55, 0.01, -128),
        (0.5, 2.55, 0.01, -128),
        (-2.55, 0.0, 0.01, 127),
        (-0.17, 2.38, 0.01, -111),
        (-1.0, 1.27, 0.01, 0),
        (0.0, 0.0, 2.0**-126, 0),
    ],
)
def test_the_choice(low, high, scale, zero_point):
    found = input_range(low, high)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert found.zero_point == zero_point
    assert found.affine == (zero_point != 0)


def test_static_layers_are_saved_and_loaded(tmp_path):
    model, x = quantized_model().eval(), torch.randn(6, 128)
    mixft.calibrate(model, [x])
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    loaded = mixft.load_quantized(Model().eval(), tmp_path / "model.safetensors")
    assert [loaded.first.mode, loaded.unused.mode] == ["static", "dynamic"]
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_model_with_an_outlier_threshold():
    model = quantized_model(outlier_threshold=6.0)
    assert model.first.outlier_threshold == model.second.outlier_threshold == 6.0
    with pytest.raises(ValueError, match="model has no dynamic QuantLinear layers"):
        mixft.calibrate(model, [torch.ones(1, 128)])
    model = Model()
    with pytest.raises(ValueError, match="needs mode 'dynamic'"):
        mixft.quantize_(model, "weight_only", outlier_threshold=6.0)
    assert type(model.first) is nn.Linear


def test_layers_with_an_outlier_threshold_stay_dynamic_and_are_saved(tmp_path):
    model = Model().eval()
    model.first = QuantLinear.from_linear(model.first, outlier_threshold=6.0)
    model.second = QuantLinear.from_linear(model.second)
    x = torch.randn(6, 128)
    assert set(mixft.calibrate(model, [x])) == {"second"}
    assert model.first.mode == "dynamic"
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    loaded = mixft.load_quantized(Model().eval(), tmp_path / "model.safetensors")
    assert loaded.first.outlier_threshold == 6.0
    assert torch.equal(loaded(x), model(x))


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(128, 128)

    def forward(self, x):
        self.layer(x)
        raise RuntimeError("out of something")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([torch.randn(3, 128), torch.full((3, 128), torch.nan)], "layer 'first' holds NaN or Inf"),
        ([torch.full((3, 128), torch.inf)], "layer 'first' holds NaN or Inf"),
        ([torch.empty(0, 128)], "no batch reached an int8 layer"),
    ],
)
def test_batches_that_are_refused_change_nothing(batches, message):
    model = quantized_model()
    model.first.eval()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        mixft.calibrate(model, batches)
    assert state(model) == before


def test_a_model_that_raises_is_as_it_was():
    model = Raises()
    mixft.quantize_(model)
    before = state(model)
    with pytest.raises(RuntimeError, match="out of something"):
        mixft.calibrate(model, [torch.randn(3, 128)])
    assert state(model) == before


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; it is a list"):
        mixft.calibrate([nn.Linear(2, 2)], [])
    with pytest.raises(ValueError, match="model has no dynamic QuantLinear layers"):
        mixft.calibrate(Model(), [torch.ones(1, 128)])
    with pytest.raises(ValueError, match=r"calibrate.*makes static layers of dynamic ones"):
        mixft.quantize_(Model(), "static")
