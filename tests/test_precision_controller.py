"""PrecisionController: every cause of a switch, on a model that provably has it."""

import math

import pytest
import torch
from precision_runs import F16, F32, QUIET, cpu_routines, iterate, parameter_dtypes, switches, three_layers  # noqa: F401
from torch import nn

import mixft
from mixft.amp import LossScaler
from mixft.optim import AdamW
from mixft.precision.border import border_of
from mixft.precision.diagnosis import Symptom
from mixft.precision.memory import free_share
from mixft.precision.recovery import Recovery
from mixft.precision.trend import LossTrend, signal_to_noise
from mixft.precision.watch import OutputWatch


class TestGradientOverflow:
    def run(self, steps=12, **options):
        """The first layer's weight gradient, a sum over 64 rows, exceeds FP16; all others are small."""
        model, optimizer = three_layers(2.0**-10, 2.0**-6, 2.0**-4)
        scaler = LossScaler(2.0**15, dynamic=False, device="cpu")
        controller = mixft.PrecisionController(model, optimizer, scaler, **{**QUIET, "interval": 4, **options})
        inputs = torch.full((64, 4), 1024.0, dtype=F16)
        sums = []
        for _ in range(steps):
            iterate(model, optimizer, scaler, controller, inputs, lambda output: output.float().sum() / 64)
            sums.append([int((~param.grad.isfinite()).sum()) for param in model.parameters()])
        return model, optimizer, scaler, controller, sums

    def test_the_layer_is_raised_and_training_goes_on(self):
        model, optimizer, scaler, controller, bad = self.run()
        assert switches(controller) == [(4, "0", "gradient overflow", "fp16", "fp32")]
        assert controller.events[0].figures == {"steps": 4, "nonfinite": 64}
        assert bad == [[16, 0, 0]] * 4 + [[0, 0, 0]] * 8
        assert scaler.overflow_steps == 4
        assert parameter_dtypes(model) == {"0": F32, "1": F16, "2": F16}
        assert controller.raised == ["0"]
        assert model[0].weight.grad.dtype == F32
        assert all(optimizer.state[param]["step"] == 8 for param in model.parameters())

    def test_the_limit_and_the_window_count(self):
        assert not self.run(overflow_limit=13)[3].events
        assert not self.run(overflow_limit=5, overflow_window=4)[3].events
        assert switches(self.run(overflow_limit=5, overflow_window=5)[3])[0][0] == 8

    def test_step_returns_the_switches_made(self):
        model, optimizer = three_layers()
        controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 2, "overflow_limit": 1})
        for layer in model:
            layer.weight.grad = torch.ones_like(layer.weight)
        model[1].weight.grad[0, 0] = math.nan
        assert controller.step(torch.ones(())) == []
        assert controller.step(torch.ones(1)) == controller.events != []
        assert str(controller.events[0]) == "step 2: 1 fp16 -> fp32, gradient overflow (steps 2, nonfinite 2)"

    def test_the_last_layer_of_the_forward_pass_that_shows_it_is_blamed(self):
        class Backwards(nn.Module):
            """Registered in another order than called."""

            def __init__(self):
                super().__init__()
                self.middle, self.last, self.first = (nn.Linear(2, 2) for _ in range(3))

            def forward(self, inputs):
                return self.last(self.middle(self.first(inputs)))

        model = Backwards().half()
        controller = mixft.PrecisionController(
            model, AdamW(model.parameters()), **{**QUIET, "interval": 1}, overflow_limit=1
        )
        model(torch.ones(1, 2, dtype=F16)).float().sum().backward()
        for param in model.parameters():
            param.grad.fill_(math.inf)
        controller.step(torch.ones(()))
        assert controller.raised == ["last"]
        assert not model.first._forward_hooks

    def test_a_layer_in_fp32_that_still_overflows_has_its_surroundings_raised(self):
        """The gradient that the second layer hands down overflows, so raising the first alone does not help."""
        model, _ = three_layers(2.0**-10, 2.0**12, 2.0**-6)
        outer = nn.Sequential(model)
        optimizer = AdamW(outer.parameters(), lr=1e-9)
        scaler = LossScaler(2.0**10, dynamic=False, device="cpu")
        controller = mixft.PrecisionController(outer, optimizer, scaler, **{**QUIET, "interval": 3})
        inputs = torch.full((2, 4), 2.0**-8, dtype=F16)
        for _ in range(9):
            iterate(outer, optimizer, scaler, controller, inputs, lambda output: output.float().sum())
        assert [event[:3] for event in switches(controller)] == [
            (3, "0.0", "gradient overflow"),
            (6, "0", "gradient overflow"),
        ]
        assert controller.raised == ["0"]
        assert scaler.overflow_steps == 6
        assert {param.dtype for param in outer.parameters()} == {F32}
        assert border_of(model[0]) is None


class Damped(nn.Module):
    """A layer whose outputs exceed FP16, and what brings them back into its range."""

    def __init__(self):
        super().__init__()
        self.big = nn.Linear(4, 4, bias=False)

    def forward(self, inputs):
        return self.big(inputs) * 2.0**-12


class TestActivationOverflow:
    def run(self, steps=16):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), Damped(), nn.LayerNorm(4)).half()
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(4))
            model[1].big.weight.copy_(torch.randn(4, 4) * 2048)
        optimizer = AdamW(model.parameters(), lr=1e-6)
        scaler = LossScaler(1024.0, device="cpu")
        controller = mixft.PrecisionController(model, optimizer, scaler, **{**QUIET, "interval": 4})
        calm, wild = torch.ones(2, 4, dtype=F16), torch.full((2, 4), 4096.0, dtype=F16)
        losses = []
        for step in range(steps):
            iterate(
                model,
                optimizer,
                scaler,
                controller,
                calm if step < 4 else wild,
                lambda output: losses.append(output.float().sum()) or losses[-1],
            )
        return model, scaler, controller, losses

    def test_what_holds_the_layer_is_raised_and_the_scale_restored(self):
        model, scaler, controller, losses = self.run(20)
        assert [event[:3] for event in switches(controller)] == [
            (12, "1.big", "activation overflow"),
            (16, "1", "activation overflow"),
        ]
        assert [loss.isfinite().item() for loss in losses] == [True] * 4 + [False] * 12 + [True] * 4
        assert scaler.get_scale() == 1024.0
        assert controller.events[0].figures == {"steps": 8, "loss_scale": 1024.0}
        assert parameter_dtypes(model) == {"0": F16, "1.big": F32, "2": F16}

    def test_outputs_are_looked_at_only_while_losses_are_lost(self):
        model, _, controller, _ = self.run(4)
        assert not any(module._forward_hooks for module in model.modules())
        model, _, controller, _ = self.run(8)
        assert all(module._forward_hooks for module in model.modules())
        model, _, controller, _ = self.run(20)
        assert [name for name, module in model.named_modules() if module._forward_hooks] == ["1"]
        assert controller.raised == ["1"]

    def test_evaluation_is_not_looked_at(self):
        layer = nn.Linear(2, 2)
        watch = OutputWatch({"layer": layer})
        watch.start_counting()
        broken = torch.full((1, 2), math.nan)
        layer.eval()(broken)
        with torch.no_grad():
            layer.train()(broken)
        assert watch.first_nonfinite() is None
        layer(torch.ones(1, 2))
        assert watch.first_nonfinite() is None
        layer(broken)
        layer(torch.ones(1, 2))
        assert watch.first_nonfinite() == "layer"

    def test_the_model_itself_is_the_last_resort(self):
        model = Damped().half()
        with torch.no_grad():
            model.big.weight.fill_(30000.0)
        optimizer = AdamW(model.parameters())
        controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 3})
        for _ in range(9):
            iterate(model, optimizer, None, controller, torch.full((1, 4), 4.0, dtype=F16))
        assert [event.layer for event in controller.events] == ["big", ""]
        assert str(controller.events[1]).startswith("step 9: the model fp16 -> fp32, activation overflow (steps 3")
        output = model(torch.full((1, 4), 4.0, dtype=F16))
        assert output.dtype == F32
        assert output.isfinite().all()


def by_hand(steps, gradients, losses=None, raised=(), **options):
    """Steps with gradients set by hand on two layers, ``gradients(step, layer)``; some may be raised from the start."""
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.Linear(64, 8, bias=False)}).half()
    optimizer = AdamW(model.parameters(), lr=1e-4)
    controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 5, "warmup_steps": 20, **options})
    controller._watch.order = {"a": 0, "b": 1, "": 2}
    controller._layout.set_raised(raised)
    controller._recovery.last_raised = dict.fromkeys(raised, 0)
    for step in range(1, steps + 1):
        for name, layer in model.items():
            layer.weight.grad = gradients(step, name).to(layer.weight.dtype)
        optimizer.step()
        controller.step(torch.tensor(1.0 + 0.1 * math.sin(step) if losses is None else losses(step)))
    return model, controller


def noise(step, name):
    return torch.randn(8, 64)


class TestLossSpike:
    def gradients(self, step, name):
        return noise(step, name) * (4.0 if (step, name) == (43, "b") else 1.0)

    def losses(self, step):
        return 6.0 if step == 43 else 1.0 + 0.1 * math.sin(step)

    def test_the_layer_whose_share_of_the_gradient_grew_is_raised(self):
        _, controller = by_hand(60, self.gradients, self.losses, spike_deviations=6.0)
        assert switches(controller) == [(45, "b", "loss spike", "fp16", "fp32")]
        figures = controller.events[0].figures
        assert figures["loss"] == 6.0
        assert figures["mean"] == pytest.approx(1.0, abs=0.05)
        assert figures["deviations"] > 50
        assert figures["growth"] == pytest.approx(2 * 16 / 17, rel=0.1)

    def test_a_layer_in_fp32_is_not_blamed(self):
        _, controller = by_hand(60, self.gradients, self.losses, raised=["b"], spike_deviations=6.0)
        assert switches(controller) == [(45, "a", "loss spike", "fp16", "fp32")]

    @pytest.mark.parametrize("options", [{"spike_deviations": None}, {"spike_deviations": 200.0}, {"warmup_steps": 43}])
    def test_not_below_the_threshold_nor_at_the_start(self, options):
        _, controller = by_hand(60, self.gradients, self.losses, **{"spike_deviations": 6.0, **options})
        assert not controller.events

    def test_the_running_mean_and_variance_are_those_of_the_losses(self):
        losses = torch.rand(40).double()
        trend = LossTrend()
        for loss in losses.tolist():
            trend.add(loss)
        assert trend.mean == pytest.approx(losses.mean().item())
        assert trend.variance == pytest.approx(losses.var(correction=0).item())
        assert trend.deviations(trend.mean + 2.0) == pytest.approx(2.0 / losses.std(correction=0).item())


class TestSignalToNoise:
    def gradients(self, step, name):
        """Layer a goes from a gradient that is the same at every step to one that is noise."""
        signal = 0.0 if name == "a" and step > 40 else 1.0
        return signal + 0.5 * noise(step, name)

    def test_the_layer_whose_gradient_became_noise_is_raised(self):
        _, controller = by_hand(80, self.gradients, snr_drop=0.25)
        (event,) = controller.events
        assert (event.layer, event.cause, event.after) == ("a", "signal-to-noise", "fp32")
        assert 40 < event.step <= 70
        assert event.figures["ratio"] < 0.25 * event.figures["mean"]

    @pytest.mark.parametrize("options", [{"snr_drop": None}, {"snr_drop": 0.25, "warmup_steps": 80}])
    def test_not_when_switched_off_nor_at_the_start(self, options):
        assert not by_hand(80, self.gradients, **options)[1].events

    def test_a_layer_in_fp32_is_left(self):
        assert not by_hand(60, self.gradients, raised=["a"], snr_drop=0.25)[1].events

    def test_a_layer_without_gradients_is_not_noise(self):
        def gradients(step, name):
            return noise(step, name) if name == "a" else torch.zeros(8, 64)

        assert not by_hand(60, gradients, snr_drop=0.01)[1].events

    def test_the_ratio_is_that_of_the_moments(self):
        param = nn.Parameter(torch.zeros(3, 5))
        optimizer = AdamW([param], betas=(0.5, 0.75))
        assert signal_to_noise(optimizer, [[param]]).tolist() == [0.0]
        grads = [torch.randn(3, 5, dtype=torch.float64) for _ in range(4)]
        for grad in grads:
            param.grad = grad.float()
            optimizer.step()
        first = sum(0.5 * 0.5 ** (3 - k) * grad for k, grad in enumerate(grads)) / (1 - 0.5**4)
        second = sum(0.25 * 0.75 ** (3 - k) * grad**2 for k, grad in enumerate(grads)) / (1 - 0.75**4)
        signal = first.square().sum()
        expected = signal / (second.sum() - signal)
        assert signal_to_noise(optimizer, [[param]]).item() == pytest.approx(expected.item(), rel=1e-5)


class TestLowering:
    def overflow_at(self, *steps):
        return lambda step, name: torch.full((8, 64), math.inf if step in steps and name == "b" else 1.0)

    def test_calm_lowers_and_takes_twice_as_long_the_next_time(self):
        _, controller = by_hand(100, self.overflow_at(4, 24), overflow_limit=1, calm_steps=10)
        assert [(event.step, event.cause) for event in controller.events] == [
            (5, "gradient overflow"),
            (15, "calm"),
            (25, "gradient overflow"),
            (45, "calm"),
        ]
        assert {(event.before, event.after) for event in controller.events[1::2]} == {("fp32", "fp16")}
        assert [event.figures["steps"] for event in controller.events[1::2]] == [10, 20]
        assert controller.raised == []

    def test_short_memory_lowers_the_calmest_and_only_overflows_raise(self, monkeypatch):
        free = iter([0.5, 0.5, 0.04, 0.04, 0.04, *[0.5] * 20])  # a spike in the last of the short ones
        monkeypatch.setattr("mixft.precision.recovery.free_share", lambda device: next(free))

        def gradients(step, name):
            return torch.full((8, 64), math.inf if step == {"b": 3, "a": 8}[name] else 1.0)

        def losses(step):
            return 9.0 if step == 22 else 1.0 + 0.1 * math.sin(step)

        options = {"overflow_limit": 1, "memory_reserve": 0.05, "spike_deviations": 6.0}
        model, controller = by_hand(30, gradients, losses, **options)
        assert switches(controller) == [
            (5, "b", "gradient overflow", "fp16", "fp32"),
            (10, "a", "gradient overflow", "fp16", "fp32"),
            (15, "b", "memory", "fp32", "fp16"),
            (20, "a", "memory", "fp32", "fp16"),
        ]
        assert controller.events[2].figures == {"free": 0.04}
        assert parameter_dtypes(model) == {"a": F16, "b": F16}

    def test_the_free_share_is_a_share(self):
        assert 0 < free_share(torch.device("cpu")) < 1
        assert free_share(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"interval": 0}, ValueError, "interval is 0"),
        ({"overflow_limit": 0}, ValueError, "overflow_limit is 0"),
        ({"overflow_window": -1}, ValueError, "overflow_window is -1"),
        ({"calm_steps": 0}, ValueError, "calm_steps is 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps is -1"),
        ({"spike_deviations": 0.0}, ValueError, "spike_deviations is 0"),
        ({"snr_drop": 1.0}, ValueError, "snr_drop is 1"),
        ({"memory_reserve": math.nan}, ValueError, "memory_reserve is nan"),
        ({"scaler": 1024.0}, TypeError, "scaler is a float"),
        ({"model": []}, TypeError, "model must be"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, TypeError, "optimizer is a SGD"),
        ({"optimizer": AdamW([nn.Parameter(torch.ones(1))])}, ValueError, "trains no 16-bit parameter"),
    ],
)
def test_bad_arguments(options, error, match):
    model, optimizer = three_layers()
    with pytest.raises(error, match=match):
        mixft.PrecisionController(**{"model": model, "optimizer": optimizer, **options})


def test_a_state_that_is_kept_stays_as_it_was():
    controller = mixft.PrecisionController(*three_layers(), interval=2)
    controller.step(torch.tensor(1.0))
    kept = controller.state_dict()["rows"]
    for loss in (2.0, 3.0):
        controller.step(torch.tensor(loss))
    assert kept["losses"].tolist() == [1.0]


@pytest.mark.parametrize(("loss", "error"), [(1.0, TypeError), (torch.ones(2), ValueError)])
def test_bad_losses(loss, error):
    controller = mixft.PrecisionController(*three_layers())
    with pytest.raises(error, match="loss"):
        controller.step(loss)


class TestRecovery:
    def test_what_was_raised_just_now_stays_where_memory_is_short(self):
        recovery = Recovery(calm_steps=None, memory_reserve=0.05)
        recovery.note_raised("first", 7)
        assert recovery.due(["first"], 7, 0.01) == []
        assert recovery.due(["first"], 8, 0.01) == [Symptom("memory", "first", {"free": 0.01})]
        assert recovery.due([], 8, 0.01) == []

    def test_a_loaded_one_decides_as_the_saved_one(self):
        saved, loaded = Recovery(10, None), Recovery(10, None)
        saved.note_raised("first", 3)
        saved.note_raised("first", 5)
        loaded.load_state_dict(saved.state_dict())
        for recovery in (saved, loaded):
            assert recovery.due(["first"], 24, None) == []
            assert recovery.due(["first"], 25, None) == [Symptom("calm", "first", {"steps": 20})]
