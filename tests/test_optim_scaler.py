"""``mixft.optim`` under ``torch.amp.GradScaler``."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from optimizer_cases import copies, every_optimizer, members, parameters, snapshot
from weight_budget import assert_same_weights, references

from mixft.amp import LossScaler


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_optimizer
def test_stock_grad_scaler(device, case, dtype, max_grad_norm):
    params = parameters(device, dtype)
    ours = case.ours(params, **case.options, max_grad_norm=max_grad_norm)
    exact, single = references(lambda params: case.reference(params, **case.options), params)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3)
    scales = []
    for step in range(6):
        targets = [torch.randn(param.shape, device=device).to(dtype) for param in params]
        overflow = step in (2, 4)
        before = snapshot(ours)
        loss = sum((param * target).float().sum() for param, target in zip(params, targets, strict=True))
        ours.zero_grad()
        scaler.scale(loss * (float("inf") if overflow else 1)).backward()
        kept = [param.grad.clone() for param in params]
        scaler.step(ours)
        scaler.update()
        scales.append(scaler.get_scale())
        assert ours.last_found_inf.item() == overflow
        assert not hasattr(ours, "grad_scale")
        if overflow:
            assert snapshot(ours) == before
            continue
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, kept, strict=True))
        norms = []
        for optimizer in (exact, single):
            for twin, target in zip(members(optimizer), targets, strict=True):
                twin.grad = target.to(twin.dtype)
            if max_grad_norm is not None:
                norms.append(torch.nn.utils.clip_grad_norm_(members(optimizer), max_grad_norm))
            optimizer.step()
        if norms:
            assert_within_budget(ours.last_grad_norm, *norms, EPSILON[torch.float32])
    assert scales == [1024, 1024, 512, 512, 256, 256]
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_grad_scaler_after_unscale(device, case):
    params = parameters(device)
    ours = case.ours(params, lr=0.01)
    exact, single = references(lambda params: case.reference(params, lr=0.01), params)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for bad in (False, True, False):
        ours.zero_grad()
        target = [torch.randn(param.shape, device=device) for param in params]
        loss = sum((param * t).sum() for param, t in zip(params, target, strict=True))
        scaler.scale(loss * (float("nan") if bad else 1)).backward()
        scaler.unscale_(ours)
        before = snapshot(ours)
        scaler.step(ours)
        scaler.update()
        if bad:
            assert snapshot(ours) == before
            continue
        for optimizer in (exact, single):
            for twin, t in zip(members(optimizer), target, strict=True):
                twin.grad = t.to(twin.dtype)
            optimizer.step()
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_clipping_looks_again_after_the_scaler(device, case):
    params = parameters(device)
    optimizer = case.ours(params, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device.type)
    before = [param.detach().clone() for param in params]
    scaler.scale(sum(param.sum() for param in params)).backward()
    scaler.unscale_(optimizer)
    params[0].grad[0] = float("nan")
    scaler.step(optimizer)
    assert optimizer.last_found_inf.item() == 1
    assert all(map(torch.equal, before, params))


@every_optimizer
def test_skip_nonfinite_off_still_obeys_a_scaler(case):
    parameter = torch.nn.Parameter(torch.randn(6))
    before = parameter.detach().clone()
    optimizer = case.ours([parameter], lr=0.1, skip_nonfinite=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((parameter * torch.inf).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.last_found_inf.item() == 1
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("where", ["hook", "step"])
@pytest.mark.parametrize("overflows", [False, True])
@every_optimizer
def test_a_step_that_failed_leaves_no_scale_behind(device, case, overflows, where):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer, twin = case.ours([param], lr=0.5), case.ours(copies([param]), lr=0.5)
    scaler = LossScaler(1024.0, device=device.type)
    scaler.scale(param.sum() * (torch.inf if overflows else 1)).backward()

    def fail(*_):
        raise KeyboardInterrupt

    if where == "hook":
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            scaler.step(optimizer)
        handle.remove()
    else:
        optimizer.param_groups[0]["lr"] = torch.ones(2, device=device)
        with pytest.raises(ValueError, match="lr"):
            scaler.step(optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
    for each in (optimizer, twin):
        for member in members(each):
            member.grad = torch.ones_like(member)
        each.step()
    assert torch.equal(param, members(twin)[0])
    assert snapshot(optimizer) == snapshot(twin)
