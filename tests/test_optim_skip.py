"""A step whose gradients hold a NaN or Inf changes no bit, on every path; clipping by the global norm."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from optimizer_cases import (
    BAD,
    SHAPES,
    every_optimizer,
    every_storage,
    give_gradients,
    members,
    mixed_parameters,
    parameters,
    snapshot,
)
from weight_budget import assert_same_weights, references

from mixft.optim.scalars import step_scalars


@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
@every_optimizer
def test_clipping_is_torch_s_over_all_groups(device, case, max_norm):
    params = mixed_parameters(device)
    ours = case.ours([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=max_norm, **case.options)
    exact, single = references(lambda params: case.reference(params, **case.options), params)
    for _ in range(3):
        give_gradients(params, scale=3.0)
        norms = []
        for optimizer in (exact, single):
            for param, twin in zip(params, members(optimizer), strict=True):
                twin.grad = param.grad.to(twin.dtype, copy=True)
            norms.append(torch.nn.utils.clip_grad_norm_(members(optimizer), max_norm))
            optimizer.step()
        ours.step()
        assert ours.last_grad_norm.shape == ()
        assert_within_budget(ours.last_grad_norm, *norms, EPSILON[torch.float32])
        assert ours.last_found_inf.item() == 0
    assert_same_weights(ours, exact, single)


def assert_only_finite_steps_change_a_bit(optimizer, params):
    for value, which in zip(BAD, (0, 3, -1), strict=True):
        before = snapshot(optimizer)
        give_gradients(params)
        params[which].grad.view(-1)[which % 2 - 1] = value
        optimizer.step()
        assert optimizer.last_found_inf.shape == ()
        assert optimizer.last_found_inf.item() == 1
        assert snapshot(optimizer) == before
    before = snapshot(optimizer)[0]
    give_gradients(params)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 0
    assert all(new != old for new, old in zip(snapshot(optimizer)[0], before, strict=True))


@every_storage
@every_optimizer
def test_a_nonfinite_gradient_changes_no_bit(device, case, storage):
    params = mixed_parameters(device, SHAPES[:2])
    groups = [{"params": params[:4]}, {"params": params[4:], **case.variations[-1]}]
    optimizer = case.ours(groups, **case.options | {"lr": 0.25}, **storage)
    give_gradients(params)
    optimizer.step()
    assert_only_finite_steps_change_a_bit(optimizer, params)


@every_optimizer
def test_a_nonfinite_gradient_at_the_first_step(device, case):
    params = mixed_parameters(device, SHAPES[:2])
    optimizer = case.ours(params, **case.options | {"lr": 0.25}, max_grad_norm=1.0)
    before = [param.detach().clone() for param in params]
    give_gradients(params)
    params[0].grad[0] = torch.nan
    optimizer.step()
    assert all(map(torch.equal, before, params))
    kept = [value for param in params for name, value in optimizer.state[param].items() if name != "master"]
    assert not any(map(torch.any, kept))
    assert_only_finite_steps_change_a_bit(optimizer, params)


@every_optimizer
def test_a_norm_beyond_fp32_skips(device, case):
    params = parameters(device)
    optimizer = case.ours(params, max_grad_norm=1.0)
    give_gradients(params)
    optimizer.step()
    before = snapshot(optimizer)
    give_gradients(params, scale=1e30)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 1
    assert snapshot(optimizer) == before


@every_optimizer
def test_skip_nonfinite_off_steps_as_torch_does(device, case):
    start = [torch.randn(5, 7), torch.randn(3)]
    ours = case.ours([torch.nn.Parameter(tensor.to(device)) for tensor in start], lr=0.1, skip_nonfinite=False)
    reference = case.reference([torch.nn.Parameter(tensor.to(device)) for tensor in start], lr=0.1)
    for bad in (1.0, torch.nan):
        for mine, other in zip(members(ours), members(reference), strict=True):
            mine.grad = torch.ones_like(mine)
            mine.grad.view(-1)[1] = bad
            other.grad = mine.grad.clone()
        ours.step()
        reference.step()
        assert ours.last_found_inf is None
    for mine, other in zip(members(ours), members(reference), strict=True):
        held = [mine, *ours.state[mine].values()]
        assert sum(value.isnan().sum() for value in held) >= 1
        torch.testing.assert_close(mine, other, equal_nan=True)
    with pytest.raises(ValueError, match="skip_nonfinite is False; with max_grad_norm"):
        case.ours(parameters(device), max_grad_norm=1.0, skip_nonfinite=False)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("bad", [False, True])
def test_the_scalars_of_two_devices_are_those_of_one(max_norm, bad):
    grads = [torch.randn(17), torch.randn(5, 7).half(), torch.randn(3)]
    if bad:
        grads[2][1] = torch.inf
    scale = torch.tensor([4.0])
    one = step_scalars({(torch.device("cpu"), None): grads}, grad_scale=scale, max_norm=max_norm)
    # The same device under two names.
    parts = {(torch.device("cpu"), None): grads[:1], (torch.device("cpu", 0), None): grads[1:]}
    two = step_scalars(parts, grad_scale=scale, max_norm=max_norm)
    for name in ("inv_scale", "clip_coef", "found_inf", "norm"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), equal_nan=True)
    assert one.found_inf.item() == bad
    early = step_scalars(parts, found_inf=torch.ones(1), max_norm=max_norm)
    assert early.found_inf.item() == 1


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_norm_of_two_devices_beyond_fp32_skips_where_it_is_clipped(max_norm, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    halves = [torch.full((17,), 1e30)], [torch.full((5,), 1e30)]
    grads = {(torch.device("cpu"), None): halves[0], (torch.device("cpu", 0), None): halves[1]}
    assert step_scalars(grads, max_norm=max_norm).found_inf.item() == (max_norm is not None)
