"""PrecisionController: what a switch leaves of parameters, optimizer state and borders, and runs that are resumed."""

import copy
import io
import math
import pickle

import pytest
import torch
from conftest import assert_within_budget
from optimizer_cases import RefuseSync, bits
from precision_runs import F16, F32, QUIET, cpu_routines, iterate, three_layers  # noqa: F401
from torch import nn

import mixft
from mixft.amp import LossScaler
from mixft.optim import AdamW
from mixft.precision import PrecisionEvent
from mixft.precision.border import border_of
from mixft.precision.diagnosis import Symptom


class TestSwitch:
    """What a switch leaves of parameters, masters, moments and everyone who holds them."""

    def trained(self, device="cpu", **options):
        model = nn.Sequential(nn.Linear(17, 5), nn.LayerNorm(5), nn.Linear(5, 3)).half().to(device)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, **options)
        controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 1, "overflow_limit": 1})
        self.inputs = torch.randn(8, 17, device=device).half()
        for _ in range(3):
            iterate(model, optimizer, None, controller, self.inputs)
        return model, optimizer, controller

    def overflow(self, model, controller, name="2"):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        model.get_parameter(f"{name}.weight").grad.view(-1)[0] = math.inf
        controller.step(torch.ones((), device=self.inputs.device))
        assert controller.raised[-1] == name

    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
    @pytest.mark.parametrize("master_weights", ["fp32", "split", "none"])
    def test_raising_and_lowering_keep_every_bit(self, device, master_weights, state_dtype):
        model, optimizer, controller = self.trained(device, master_weights=master_weights, state_dtype=state_dtype)
        params = list(model.parameters())
        has_masters = master_weights != "none"

        def moments():
            return [
                {name: bits(value) for name, value in optimizer.state[param].items() if name != "master"}
                for param in params
            ]

        before, narrow = moments(), [bits(param) for param in params]
        saved = optimizer.state_dict()["state"]
        wide = [bits(saved[place].get("master", param.float())) for place, param in enumerate(params)]
        masters = [bits(optimizer.state[param]["master"]) for param in params] if has_masters else []
        self.overflow(model, controller)
        raised = [param.dtype == F32 for param in params]
        assert raised == [name.startswith("2.") for name, _ in model.named_parameters()]
        for place, param in enumerate(params):
            assert param.grad.dtype == param.dtype
            assert bits(param) == (wide if raised[place] else narrow)[place]
            assert ("master" in optimizer.state[param]) == (has_masters and not raised[place])
        controller._lower(Symptom("calm", "2", {}))
        assert [param.dtype for param in params] == [F16] * len(params)
        assert [bits(param) for param in params] == narrow
        assert moments() == before
        # An FP16 remainder is exact from 2^-16 up, and every weight here is.
        assert not has_masters or [bits(optimizer.state[param]["master"]) for param in params] == masters
        assert all(ours is param for ours, param in zip(model.parameters(), params, strict=True))
        assert all(ours is param for ours, param in zip(optimizer.param_groups[0]["params"], params, strict=True))
        assert border_of(model[2]) is None

    def test_training_in_fp32_and_back_keeps_what_fp32_learned(self):
        model, optimizer, controller = self.trained()
        self.overflow(model, controller)
        for _ in range(3):
            iterate(model, optimizer, None, controller, self.inputs)
        learned = bits(model[2].weight)
        controller._lower(Symptom("calm", "2", {}))
        assert bits(optimizer.state[model[2].weight]["master"]) == learned
        assert optimizer.state[model[2].weight]["step"] == 6

    def test_schedulers_go_on(self):
        model, optimizer, controller = self.trained()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        self.overflow(model, controller)
        before = model[2].weight.detach().clone()
        iterate(model, optimizer, None, controller, self.inputs)
        scheduler.step()
        assert not torch.equal(model[2].weight, before)
        assert optimizer.param_groups[0]["lr"] == 5e-3

    def test_values_of_a_raised_layer_against_fp64(self):
        model, _, controller = self.trained()
        self.overflow(model, controller, "0")
        plain = copy.deepcopy(model)
        controller._layout.set_raised([])
        low = copy.deepcopy(model)
        exact = copy.deepcopy(plain).double()
        for module in exact.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        outputs = []
        for net, inputs in ((plain, self.inputs), (exact, self.inputs.double()), (low, self.inputs)):
            net.zero_grad()
            outputs.append(net(inputs))
            outputs[-1].double().square().sum().backward()
        assert outputs[0].dtype == F16
        assert_within_budget(outputs[0], outputs[1].detach(), outputs[2].detach(), 1e-3)
        for ours, reference, other in zip(plain.parameters(), exact.parameters(), low.parameters(), strict=True):
            assert_within_budget(ours.grad, reference.grad, other.grad, 1e-3)

    def test_inside_a_policy_borders_come_back(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        policy = mixft.PrecisionPolicy({"*": "fp16", "LayerNorm": "fp32"})
        optimizer = AdamW(model.parameters())
        policy.apply(model, optimizer)
        controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 1, "overflow_limit": 1})
        self.inputs = torch.ones(2, 4)
        iterate(model, optimizer, None, controller, self.inputs)
        self.overflow(model, controller, "2")
        assert (border_of(model[2]).dtype, border_of(model[2]).outputs) == (F32, F16)
        assert model(self.inputs).dtype == F16
        with policy.evaluating(model, optimizer):
            assert model(self.inputs).dtype == F32
        assert model(self.inputs).dtype == F16
        controller._lower(Symptom("calm", "2", {}))
        assert (border_of(model[2]).dtype, border_of(model[2]).outputs) == (F16, None)
        policy.remove(model, optimizer)
        assert {param.dtype for param in model.parameters()} == {F32}

    def test_tied_layers_are_raised_together(self):
        model = nn.ModuleDict(
            {"embed": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        model.half()
        controller = mixft.PrecisionController(model, AdamW(model.parameters()), **QUIET, interval=1, overflow_limit=1)
        self.inputs = torch.zeros(1)
        self.overflow(model, controller, "embed")
        assert model["head"].weight is model["embed"].weight
        assert model["embed"].weight.dtype == F32
        tokens = torch.tensor([1, 2])
        hidden = model["inner"](model["embed"](tokens))
        assert hidden.dtype == model["head"](hidden).dtype == F16

    def test_copies_of_a_model_with_a_raised_layer(self):
        model, _, controller = self.trained()
        self.overflow(model, controller)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(self.inputs), model(self.inputs))

    def test_nothing_waits_between_reads(self):
        model, optimizer = three_layers()
        controller = mixft.PrecisionController(model, optimizer, interval=3, memory_reserve=None)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        loss = torch.ones(())
        with RefuseSync():
            controller.step(loss)
            controller.step(loss)
        with pytest.raises(AssertionError, match="waits for the device"), RefuseSync():
            controller.step(loss)

    def test_missing_gradients(self):
        model, optimizer = three_layers()
        controller = mixft.PrecisionController(model, optimizer, **{**QUIET, "interval": 2, "overflow_limit": 1})
        model[2].weight.grad = torch.full((4, 4), math.inf, dtype=F16)
        controller.step(torch.ones(()))
        model[0].weight.grad, model[2].weight.grad = model[2].weight.grad, None
        controller.step(torch.ones(()))
        assert sorted(controller.raised) == ["0", "2"]
        for layer in model:
            layer.weight.grad = None
        controller.step(torch.ones(()))
        assert not controller._record.rows().nonfinite.any()
        controller.step(torch.ones(()))
        assert sorted(controller.raised) == ["0", "2"]


class TestState:
    def run(self, steps, resume_after=None):
        torch.manual_seed(0)

        def make():
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).half()
            optimizer = AdamW(model.parameters(), lr=1e-2)
            scaler = LossScaler(2.0**15, growth_interval=4, device="cpu")
            options = {"interval": 4, "overflow_limit": 2, "calm_steps": 8, "memory_reserve": None, "warmup_steps": 4}
            return model, optimizer, scaler, mixft.PrecisionController(model, optimizer, scaler, **options)

        model, optimizer, scaler, controller = make()
        data = [torch.randn(8, 4).half() * (64.0 if 4 < step < 12 else 1.0) for step in range(steps)]
        for step, inputs in enumerate(data):
            if step == resume_after:
                file = io.BytesIO()
                parts = (controller, model, optimizer, scaler)
                torch.save([part.state_dict() for part in parts], file)
                file.seek(0)
                model, optimizer, scaler, controller = make()
                for part, state in zip((controller, model, optimizer, scaler), torch.load(file), strict=True):
                    part.load_state_dict(state)
            iterate(model, optimizer, scaler, controller, inputs, lambda output: output.float().sum())
        return [bits(param) for param in model.parameters()], controller

    @pytest.mark.parametrize("resume_after", [3, 10, 16, 30])
    def test_a_resumed_run_is_the_same_run(self, resume_after):
        expected, controller = self.run(32)
        assert {event.cause for event in controller.events} >= {"gradient overflow", "calm"}
        resumed, other = self.run(32, resume_after)
        assert resumed == expected
        assert other.events == controller.events
        assert all(isinstance(event, PrecisionEvent) for event in other.events)

    def test_a_state_that_does_not_fit(self):
        _, controller = self.run(10)
        state = controller.state_dict()
        model, optimizer = three_layers()
        other = mixft.PrecisionController(model, optimizer, interval=4)
        with pytest.raises(ValueError, match="3 parameters"):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match="'elsewhere' raised"):
            controller.load_state_dict({**state, "raised": ["elsewhere"]})
