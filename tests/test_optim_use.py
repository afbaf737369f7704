"""How optimizers are used around the step: schedulers, closures, hooks, groups, no gradients, no waiting."""

import copy

import pytest
import torch
import torch._dynamo
from optimizer_cases import (
    RefuseSync,
    copies,
    every_optimizer,
    give_gradients,
    members,
    parameters,
    run_beside,
)
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler
from weight_budget import assert_same_weights, references

from mixft.optim import SGD


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


SCHEDULES = {
    "halving": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [2],
    ),
    # Moves the first beta, or the momentum, too.
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@every_optimizer
def test_schedulers(device, case, lr, schedule):
    params = parameters(device)
    ours = case.ours(params, lr=copy.deepcopy(lr))
    # A rate of the same kind: with a tensor, torch 2.6's SequentialLR gives every optimizer another warm-up.
    exact, single = references(lambda params: case.reference(params, lr=copy.deepcopy(lr)), params)
    schedules = [schedule(optimizer) for optimizer in (ours, exact, single)]
    for _ in range(5):
        run_beside(ours, [exact, single], 1)
        for schedule in schedules:
            schedule.step()
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_a_closure_runs_with_gradients_and_its_loss_is_returned(device, case):
    params = parameters(device)
    ours = case.ours(params, lr=0.01)
    before = [param.detach().clone() for param in params]

    def closure():
        assert torch.is_grad_enabled()
        ours.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    assert ours.step(closure).requires_grad
    assert not any(map(torch.equal, before, params))
    ours.zero_grad()
    assert all(param.grad is None for param in params)


@every_optimizer
def test_a_group_can_be_added_later(device, case):
    params = parameters(device)
    ours = case.ours(params[:2], lr=0.01)
    exact, single = references(lambda params: case.reference(params, lr=0.01), params[:2])
    run_beside(ours, [exact, single], 1)
    ours.add_param_group({"params": params[2:], "lr": 0.1})
    exact.add_param_group({"params": copies(params[2:], torch.float64), "lr": 0.1})
    single.add_param_group({"params": copies(params[2:], torch.float32), "lr": 0.1})
    run_beside(ours, [exact, single], 2)
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_a_parameter_can_be_replaced(device, case):
    params = parameters(device)
    ours = case.ours(params, **case.options)
    exact, single = references(lambda params: case.reference(params, **case.options), params)
    run_beside(ours, [exact, single], 2)
    for optimizer in (ours, exact, single):
        group = optimizer.param_groups[0]
        old = group["params"][1]
        new = torch.nn.Parameter(old.detach() * 2)
        optimizer.state[new] = optimizer.state.pop(old)
        group["params"][1] = new
        # State of another kind than moved: a fresh start.
        optimizer.state.pop(group["params"][0])
    run_beside(ours, [exact, single], 2)
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_state_can_be_replaced(device, case):
    params = parameters(device)
    ours = case.ours(params, **case.options)
    exact, single = references(lambda params: case.reference(params, **case.options), params)
    run_beside(ours, [exact, single], 2)
    for optimizer in (ours, exact, single):
        for param in members(optimizer):
            for name in ours.state_names(ours.param_groups[0]):
                optimizer.state[param][name] = optimizer.state[param][name] * 0.5
    run_beside(ours, [exact, single], 2)
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_hooks_run(device, case):
    params = parameters(device)
    optimizer = case.ours(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    give_gradients(params)
    optimizer.step()
    assert calls == ["before", "after"]
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: saved | {"note": 1})
    saved = optimizer.state_dict()
    assert calls[2:] == ["saving"]
    assert saved["note"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: calls.append(sorted(loaded["state"][0])))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(saved)
    assert calls[3:] == [sorted(saved["state"][0]), "loaded"]


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_optimizer
def test_the_step_never_reads_a_value(device, case, dtype, max_grad_norm):
    params = parameters(device, dtype)
    optimizer = case.ours(params, max_grad_norm=max_grad_norm)
    for lr in (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        give_gradients(params)
        with RefuseSync():
            optimizer.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), RefuseSync():
        optimizer.last_found_inf.item()


@every_optimizer
def test_no_state_is_made_in_a_capture(device, case, monkeypatch):
    """Every replay would begin with new state."""
    params = parameters(device)
    optimizer = case.ours(params, **case.options)
    give_gradients(params)
    before = [param.detach().clone() for param in params]
    with monkeypatch.context() as patch:
        patch.setattr("mixft.optim.members.capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"step of a parameter of shape .* take one step before the capture"):
            optimizer.step()
    assert all(map(torch.equal, before, params))
    assert not any(optimizer.state.values())
    optimizer.step()
    monkeypatch.setattr("mixft.optim.members.capturing", lambda device: True)
    params[0].grad = None
    optimizer.step()


@every_optimizer
def test_no_gradients(device, case):
    optimizer = case.ours(parameters(device), max_grad_norm=1.0)
    assert optimizer.step() is None
    assert not optimizer.state


@every_optimizer
def test_a_compiled_function_may_step(case):
    """The step is no part of a graph: the function breaks in two around it, once, and is not compiled again."""
    params = parameters("cpu")
    ours = case.ours(params, lr=0.01)
    beside = case.ours(copies(params), lr=0.01)
    torch._dynamo.reset()
    graphs = CompileCounter()

    @torch.compile(backend=graphs)
    def train(scale):
        doubled = scale * 2
        for param in params:
            param.grad = param.detach() * doubled
        ours.step()
        return doubled + 1

    for scale in (1.0, 0.5, 2.0):
        train(torch.tensor(scale))
        for twin in members(beside):
            twin.grad = 2 * scale * twin.detach()
        beside.step()
        ours.param_groups[0]["lr"] = beside.param_groups[0]["lr"] = 0.01 * scale
    assert graphs.frame_count == 2
    for param, twin in zip(params, members(beside), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_momentum_that_begins_late_begins_with_a_gradient(device):
    params = parameters(device)
    options = {"lr": 0.01, "dampening": 0.5}
    ours = SGD(params, **options)
    exact, single = references(lambda params: torch.optim.SGD(params, **options), params)
    run_beside(ours, [exact, single], 2)
    for optimizer in (ours, exact, single):
        optimizer.param_groups[0]["momentum"] = 0.9
    run_beside(ours, [exact, single], 2)
    assert_same_weights(ours, exact, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_backward_through_weights_of_before_the_step_is_an_error(device, case, dtype):
    param = torch.nn.Parameter(torch.randn(17, device=device).to(dtype))
    optimizer = case.ours([param])
    for _ in range(2):
        loss = (param * param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
