"""``mixft.optim.release_gradients``: parameters stepped inside backward."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from optimizer_cases import (
    STORAGES,
    RefuseSync,
    copies,
    every_optimizer,
    every_storage,
    members,
    mixed_parameters,
    parameters,
    snapshot,
)
from torch.utils.checkpoint import checkpoint

from mixft.amp import GradAccumulator
from mixft.optim import AdamW, release_gradients


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


def loss_of(params, targets, scale=1.0):
    return sum(((param - target).float() ** 2).sum() for param, target in zip(params, targets, strict=True)) * scale


@every_storage
@every_optimizer
def test_it_does_what_the_step_does(device, case, storage):
    params = mixed_parameters(device)
    targets = [torch.randn_like(param) for param in params]
    released = case.ours(params, **case.options, **storage)
    whole = case.ours(copies(params), **case.options, **storage)
    with release_gradients(released):
        for _ in range(2):
            loss_of(params, targets).backward()
            assert all(param.grad is None for param in params)
            released.step()
            loss_of(members(whole), targets).backward()
            whole.step()
            whole.zero_grad()
            assert released.last_found_inf.item() == 0
    assert snapshot(released) == snapshot(whole)
    loss_of(params, targets).backward()
    assert all(param.grad is not None for param in params)
    released.step()
    loss_of(members(whole), targets).backward()
    whole.step()
    assert snapshot(released) == snapshot(whole)


def test_gradients_are_gone_before_the_next_one_comes():
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(5)]
    optimizer = AdamW(params)
    alive = []
    for param in params:
        param.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in params)))
    release_gradients(optimizer)
    loss_of(params, [0.0] * 5).backward()
    assert alive == [1] * 5


@every_optimizer
def test_a_nonfinite_gradient_spares_its_parameter_and_no_other(device, case):
    params = parameters(device)
    optimizer = case.ours(params, **case.options)
    release_gradients(optimizer)
    for bad in (1, None):
        before, _ = snapshot(optimizer)
        factors = [
            torch.full_like(param, torch.nan if position == bad else 1.0) for position, param in enumerate(params)
        ]
        sum((param * factor).sum() for param, factor in zip(params, factors, strict=True)).backward()
        optimizer.step()
        after, _ = snapshot(optimizer)
        changed = [old != new for old, new in zip(before, after, strict=True)]
        assert changed == [position != bad for position in range(len(params))]
        assert optimizer.last_found_inf.shape == ()
        assert optimizer.last_found_inf.item() == (bad is not None)


def test_what_has_no_hook_is_stepped_by_step(device):
    params = parameters(device)
    params[0].requires_grad_(False)
    optimizer = AdamW(params[:2], lr=0.1)
    release_gradients(optimizer)
    params[0].requires_grad_(True)
    optimizer.add_param_group({"params": params[2:]})
    before, _ = snapshot(optimizer)
    (loss_of(params, [0.0] * 5) + (params[0] * torch.nan).sum()).backward()
    assert [param.grad is None for param in params] == [False, True, False, False, False]
    params[0].grad.nan_to_num_()
    optimizer.step()
    assert optimizer.last_found_inf.item() == 0
    assert all(old != new for old, new in zip(before, snapshot(optimizer)[0], strict=True))


def test_tied_parameters_are_stepped_once():
    shared = torch.nn.Parameter(torch.randn(6, 6))
    twin = torch.nn.Parameter(shared.detach().clone())
    optimizer, beside = AdamW([shared]), AdamW([twin])
    release_gradients(optimizer)
    given = torch.randn(3, 6)
    for param in (shared, twin):
        torch.nn.functional.linear(torch.nn.functional.linear(given, param), param.t()).sum().backward()
    beside.step()
    assert snapshot(optimizer) == snapshot(beside)


def test_a_copy_steps_by_its_step_alone():
    linear = torch.nn.Linear(3, 2)
    optimizer = AdamW(linear.parameters())
    with release_gradients(optimizer):
        for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
            twin, its_optimizer = copied((linear, optimizer))
            before = snapshot(its_optimizer)
            twin(torch.ones(3)).sum().backward()
            assert snapshot(its_optimizer) == before
            its_optimizer.step()
            assert snapshot(its_optimizer) != before


def test_backward_never_waits(device):
    params = mixed_parameters(device)
    optimizer = AdamW(params, **STORAGES["split-int8-state"])
    release_gradients(optimizer)
    for _ in range(2):
        _, before = snapshot(optimizer)
        with RefuseSync():
            loss_of(params, [0.0] * len(params)).backward()
        assert all(param.grad is None for param in params)
        _, after = snapshot(optimizer)
        assert all(old != new for old, new in zip(before, after, strict=True))
        optimizer.step()


def test_a_second_gradient_before_the_step_is_refused(device):
    layer = torch.nn.Linear(8, 8).to(device)
    optimizer = AdamW(layer.parameters())
    hidden = torch.ones(4, 8, device=device, requires_grad=True)
    with release_gradients(optimizer):
        layer(hidden).sum().backward()
        with pytest.raises(RuntimeError, match=r"second gradient since optimizer.step\(\); call step\(\) after each"):
            layer(hidden).sum().backward()
        optimizer.step()
        # One layer three times, its gradients apart.
        for _ in range(3):
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            hidden.sum().backward()


def test_what_cannot_hold_is_refused():
    params = parameters("cpu")
    with pytest.raises(ValueError, match=r"max_grad_norm is 1.0; the norm of all gradients"):
        release_gradients(AdamW(params, max_grad_norm=1.0))
    accumulated = AdamW(params)
    accumulator = GradAccumulator(accumulated)
    with pytest.raises(ValueError, match="optimizer has a GradAccumulator"):
        release_gradients(accumulated)
    accumulator.remove()
    with release_gradients(accumulated), pytest.raises(ValueError, match="gradients are released inside backward"):
        GradAccumulator(accumulated)
    GradAccumulator(accumulated)
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        release_gradients(torch.optim.SGD(params))
    optimizer = AdamW(params)
    with release_gradients(optimizer), pytest.raises(RuntimeError, match="released already"):
        release_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    release_gradients(optimizer)
    scaler.scale(loss_of(params, [0.0] * 5)).backward()
    with pytest.raises(RuntimeError, match="a GradScaler hands over their scale only now"):
        scaler.step(optimizer)


def test_a_parameter_that_left_the_optimizer_keeps_its_gradient(device):
    params = parameters(device)
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    with release_gradients(optimizer):
        del optimizer.param_groups[1]
        before = [param.detach().clone() for param in params]
        loss_of(params, [0.5] * len(params)).backward()
        optimizer.step()
    assert [param.grad is None for param in params] == [True, True, False, False, False]
    changed = [not torch.equal(param, kept) for param, kept in zip(params, before, strict=True)]
    assert changed == [True, True, False, False, False]


@pytest.mark.parametrize("stepped", [False, True])
def test_nothing_is_kept_alive(device, stepped):
    params = parameters(device)
    optimizer = AdamW(params, lr=0.1)
    release_gradients(optimizer)
    loss_of(params, [0.0] * len(params)).backward()
    if stepped:
        optimizer.step()
    gone = weakref.ref(params[0]), weakref.ref(optimizer)
    kept = params.pop()
    del params, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    # Of an optimizer that is gone.
    kept.square().sum().backward()
    assert kept.grad is not None


def test_a_norm_that_is_to_be_clipped_afterwards_is_refused(device):
    params = parameters(device)
    optimizer = AdamW(params, lr=0.1)
    release_gradients(optimizer)
    optimizer.max_grad_norm = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"max_grad_norm is 1\.0 by now, and gradients are released"):
        loss_of(params, [0.0] * len(params)).backward()
    assert snapshot(optimizer) == before
