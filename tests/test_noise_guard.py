"""The guard of int8 training: what it measures, that it catches an outlier, and what it says."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mixft
from mixft.nn import QuantLinear
from mixft.nn.noise_guard import feature_sqnr
from mixft.ops import quantize
from mixft.ops.host_copy import HostCopy


def train(model, x, passes):
    for _ in range(passes):
        model(x).square().sum().backward()
        model.zero_grad()


def network(device):
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128)).to(device)
    mixft.quantize_(model, "train", shape_gating=False)
    return model


def test_the_ratio_is_the_median_of_features(device):
    x = torch.randn(33, 18, device=device)
    x[:, 4] = 0
    x[:, 7] *= 1000
    values, scale, _ = quantize(x)
    noise = (x.double() - values.double() * scale.double()).square().sum(0) / x.double().square().sum(0)
    exact = -10 * noise[~noise.isnan()].sort().values[8].log10()
    assert feature_sqnr(x, values, scale).item() == pytest.approx(exact.item(), abs=1e-3)
    assert exact < 3
    whole = (x - values * scale).square().sum() / x.square().sum()
    assert -10 * whole.log10() > 25


def test_normal_data_is_measured_and_left_in_int8(native_device):
    model = network(native_device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.randn(40, 128, device=native_device), 12)
    report = mixft.model_report(model)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for layer in report.layers:
        assert set(layer.sqnr) == {"input", "weight", "gradient"}
        assert all(25 < ratio < 50 for ratio in layer.sqnr.values())
        assert (layer.mode, layer.backward, layer.fallback) == ("train", "int8", "")
        assert layer.bytes == 4 * 128 * 129
    assert not report.fallbacks
    assert "2 linear layers" in str(report)


def test_an_outlier_layer_falls_back_and_says_so_once(native_device):
    model = network(native_device)
    x = torch.randn(40, 128, device=native_device)
    x[:, 5] = 3000.0
    with pytest.warns(UserWarning, match="layer '0': signal to quantization noise below 10 dB .input") as caught:
        train(model, x, 120)
    assert len(caught) == 1
    first, last = mixft.model_report(model).layers
    assert first.fallback == "layer"
    assert first.fallback_since < 12
    assert first.backward == "16bit"
    assert last.fallback == ""
    assert "pass" in str(mixft.model_report(model))
    linear = model[0].to_linear()
    torch.testing.assert_close(model[0](x), linear(x))


def test_a_gradient_alone_takes_only_the_backward_to_floats(native_device):
    layer = QuantLinear(128, 128, mode="train", shape_gating=False, device=native_device)
    x = torch.randn(40, 128, device=native_device, requires_grad=True)
    grad = torch.randn(40, 128, device=native_device)
    grad[:, 3] = 1e5
    lag = 10 if native_device.type == "cuda" else 1
    for _ in range(lag):
        layer(x).backward(grad)
    with pytest.warns(UserWarning, match="a QuantLinear: .*gradient"):
        layer(x)
    guard = layer.int8_training.guard
    assert guard.fallback == "gradients"
    assert guard.sqnr["input"] > 30
    expected = mixft.ops.training_int8_linear(x, layer.weight, layer.bias, backward="16bit")
    assert torch.equal(layer(x), expected)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    (want,) = torch.autograd.grad(expected, x, grad)
    assert torch.equal(found, want)


class Checkpointed(torch.nn.Module):
    """Two calls of one pair of layers a forward, each computed again in the backward; the second layer's input has an
    outlier."""

    def __init__(self, device, reentrant):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(128, 128, device=device) for _ in range(2))
        self.dropout = torch.nn.Dropout(0.2)
        self.reentrant = reentrant

    def block(self, x):
        x = torch.tanh(self.first(x))
        return self.dropout(self.second(torch.cat([x[:, :1] * 3000, x[:, 1:]], 1)))

    def forward(self, x):
        for _ in range(2):
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


def gradients_of_steps(device, reentrant, batches=2, **options):
    torch.manual_seed(0)
    model = Checkpointed(device, reentrant)
    mixft.quantize_(model, "train", shape_gating=False, **options)
    found = []
    for _ in range(4 if device.type == "cpu" else 12):
        # As in contrastive training, one backward goes through several forwards.
        losses = [model(torch.randn(40, 128, device=device, requires_grad=True)).sum() for _ in range(batches)]
        sum(losses).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    return found, model


@pytest.mark.filterwarnings("ignore:layer 'first'")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_fallback_does_not_come_between_a_forward_and_what_checkpointing_computes_again(native_device, reentrant):
    with pytest.warns(UserWarning, match="layer 'second'"):
        expected, plain = gradients_of_steps(native_device, None)
    with pytest.warns(UserWarning, match="layer 'second'"):
        found, model = gradients_of_steps(native_device, reentrant)
    assert model.second.guard.fallback == plain.second.guard.fallback == "layer"
    assert plain.second.guard.since > 0
    # The first step runs in int8, the last in floats; the passes in between are counted differently.
    for step in (0, -1):
        for mine, theirs in zip(found[step], expected[step], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore:layer 'first'")
def test_a_fallback_waits_for_the_end_of_the_forward_that_it_was_measured_in(native_device):
    with pytest.warns(UserWarning, match="layer 'second'"):
        _, model = gradients_of_steps(native_device, None)
    assert model.second.guard.since % 4 == 0


def test_no_floor_no_measurement(native_device):
    layer = QuantLinear(128, 128, mode="train", shape_gating=False, min_sqnr=None, device=native_device)
    x = torch.randn(40, 128, device=native_device)
    x[:, 5] = 3000.0
    train(layer, x, 5)
    assert layer.int8_training.guard.sqnr == {}


def test_a_copy_keeps_what_was_found(native_device):
    layer = QuantLinear(128, 128, mode="train", shape_gating=False, device=native_device)
    layer(torch.randn(40, 128, device=native_device)).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.int8_training.guard.passes == 1
    train(twin, torch.randn(40, 128, device=native_device), 1)


def test_figures_leave_the_device_before_they_are_read(monkeypatch):
    """As on a GPU, where a copy that starts when it is read would have the host wait for all that is queued."""
    layer = QuantLinear(128, 128, mode="train", shape_gating=False)
    guard = layer.int8_training.guard
    seen = []

    class Copy(HostCopy):
        def __init__(self, values):
            super().__init__(values)
            seen.append(("starts", guard.passes))

        def tolist(self):
            seen.append(("is read", guard.passes))
            return super().tolist()

    monkeypatch.setattr("mixft.nn.noise_guard.HostCopy", Copy)
    x = torch.randn(40, 128)
    train(layer, x, 1)
    guard.read_at = 5
    train(layer, x, 6)
    assert seen == [("starts", 1), ("is read", 4)]
    assert set(guard.sqnr) == {"input", "weight", "gradient"}


def test_a_figure_that_comes_after_the_others_left_is_read_too():
    """Two backwards in flight, as a pipeline has them: the first runs before the measured one."""
    layer = QuantLinear(128, 128, mode="train", shape_gating=False)
    guard = layer.int8_training.guard
    x = torch.randn(40, 128)
    measured, other = layer(x), layer(x)
    guard.read_at = 4
    other.sum().backward()
    late = layer(x)
    measured.sum().backward()
    late.sum().backward()
    train(layer, x, 1)
    assert set(guard.sqnr) == {"input", "weight"}
    train(layer, x, 1)
    assert set(guard.sqnr) == {"input", "weight", "gradient"}


def test_report_of_other_layers_and_input():
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 8))
    mixft.quantize_(model)
    report = mixft.model_report(model)
    assert [(layer.mode, layer.backward) for layer in report.layers] == [("dynamic", "int8"), ("float", "float")]
    with pytest.raises(TypeError, match="it is a int"):
        mixft.model_report(3)


def test_the_gradients_figure_is_the_lower_of_its_two_roundings(native_device):
    layer = QuantLinear(128, 128, mode="train", shape_gating=False, device=native_device)
    guard = layer.int8_training.guard
    gradient = torch.randn(40, 128, device=native_device)
    x = torch.randn(40, 128, device=native_device)
    x *= torch.randn(40, 1, device=native_device).mul(2).exp()
    weight_scale = layer.weight.detach().abs().amax(1) / 127
    x_scale = x.abs().amax(1, keepdim=True) / 127
    ratios = []
    for folded, dim in ((gradient * weight_scale, -1), (gradient * x_scale, 0)):
        values, scale, _ = quantize(folded, dim=dim)
        ratios.append(feature_sqnr(folded, values, scale).item())
    assert ratios[1] < ratios[0] - 0.5
    layer(x).backward(gradient)
    assert guard.measured["gradient"].item() == pytest.approx(min(ratios), abs=1e-2)
    narrow = QuantLinear(128, 128, mode="train", shape_gating=False, backward="weight_grad_16bit", device=native_device)
    narrow.load_state_dict(layer.state_dict())
    narrow(x).backward(gradient)
    assert narrow.int8_training.guard.measured["gradient"].item() == pytest.approx(ratios[0], abs=1e-2)
