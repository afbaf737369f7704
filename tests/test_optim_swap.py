"""``mixft.optim.swap``: a live torch optimizer replaced in the middle of training."""

import copy
import gc

import pytest
import torch
from optimizer_cases import (
    CASES,
    bits,
    copies,
    every_optimizer,
    every_storage,
    every_variation,
    give_gradients,
    members,
    mixed_parameters,
    parameters,
    run_beside,
    snapshot,
    through_a_file,
    weight,
)
from weight_budget import assert_same_weights, references

from mixft.amp import GradAccumulator
from mixft.optim import SGD, Adam, AdamW, release_gradients, swap

TORCH_CASES = [case for case in CASES if case.reference.__module__.startswith("torch.optim")]
every_torch_optimizer = pytest.mark.parametrize("case", TORCH_CASES, ids=str)


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 2.0**-6, "weight_decay": 0.3}]


@every_variation
def test_training_goes_on_where_torch_was(device, case, variation):
    if case not in TORCH_CASES:
        with pytest.raises(TypeError, match=r"ReferenceLion; swap takes torch\.optim\.AdamW, torch\.optim\.Adam"):
            swap(case.reference([torch.nn.Parameter(torch.ones(2))]))
        return
    options = case.options | variation
    params = parameters(device)
    theirs = case.reference(groups(params), **options, foreach=False)
    exact, single = references(lambda params: case.reference(groups(params), **options), params)
    run_beside(theirs, [exact, single], 2)
    ours = swap(theirs)
    assert type(ours) is case.ours
    assert ours.param_groups is theirs.param_groups
    assert [group["lr"] for group in ours.param_groups] == [options["lr"], 2.0**-6]
    assert not any(name in group for group in ours.param_groups for name in ("foreach", "fused", "capturable"))
    run_beside(ours, [exact, single], 3)
    assert_same_weights(ours, exact, single)
    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert ours.param_groups[2]["weight_decay"] == options["weight_decay"]


@every_torch_optimizer
def test_16_bit_parameters_get_masters_and_wide_state(device, case):
    params = mixed_parameters(device)
    theirs = case.reference(params, **case.options, foreach=False)
    for group in theirs.param_groups:
        # 1e-8 is 0 in FP16, and so is the square of a small gradient: torch would divide by zero.
        group |= {"eps": 1e-3} if "eps" in group else {}
    run_beside(theirs, [], 2)
    before = [param.detach().clone() for param in params]
    ours = swap(theirs, max_grad_norm=1.0)
    assert ours.max_grad_norm == 1.0
    for param, value in zip(params, before, strict=True):
        assert torch.equal(weight(ours, param), value.float())
        assert {held.dtype for held in ours.state[param].values()} == {torch.float32}
        assert ("master" in ours.state[param]) == (param.dtype != torch.float32)
    run_beside(ours, [], 1)


@every_torch_optimizer
@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)])
def test_schedulers_of_the_old_optimizer_go_on(device, case, lr, recwarn):
    params = parameters(device)
    theirs = case.reference(params, lr=copy.deepcopy(lr))
    schedule = torch.optim.lr_scheduler.StepLR(theirs, 1, 0.5)
    ours = swap(theirs)
    for step in range(3):
        run_beside(ours, [], 1)
        schedule.step()
        assert float(ours.param_groups[0]["lr"]) == 0.125 * 0.5 ** (step + 1)
    ours.load_state_dict(ours.state_dict())
    schedule.step()
    assert float(ours.param_groups[0]["lr"]) == 0.125 * 0.5**4
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]


@every_torch_optimizer
def test_the_old_optimizer_is_retired(case):
    params = parameters("cpu")
    theirs = case.reference(params, **case.options)
    run_beside(theirs, [], 1)
    calls = []
    handle = theirs.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    ours = swap(theirs)
    assert not theirs.state
    before = [bits(param) for param in params]
    with pytest.raises(RuntimeError, match=f"swapped for a mixft.optim.{case}; use that one"):
        theirs.step()
    with pytest.raises(RuntimeError, match=f"swapped for a mixft.optim.{case}"):
        theirs.state_dict()
    with pytest.raises(RuntimeError, match=f"swapped for a mixft.optim.{case}"):
        theirs.load_state_dict(ours.state_dict())
    assert [bits(param) for param in params] == before
    run_beside(ours, [], 1)
    assert calls == [ours]
    handle.remove()
    del theirs
    gc.collect()
    run_beside(ours, [], 1)
    assert calls == [ours]


@every_torch_optimizer
def test_names_stay(case):
    model = torch.nn.Linear(3, 2)
    ours = swap(case.reference(model.named_parameters()))
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]


@every_storage
@every_optimizer
def test_mixft_s_own_state_is_kept_in_another_way(device, case, storage):
    params = mixed_parameters(device)
    whole = case.ours(params, **case.options)
    run_beside(whole, [], 2)
    masters = [weight(whole, param).clone() for param in params]
    other = swap(whole, **storage)
    assert other.storage == case.ours(copies(params), **storage).storage
    for param, master in zip(params, masters, strict=True):
        kept = weight(other, param)
        exact = storage.get("master_weights") != "none"
        torch.testing.assert_close(
            kept.float(), master if exact else master.to(param.dtype).float(), rtol=0, atol=2e-12
        )
    back = swap(other, **dict.fromkeys([], None))
    assert back.storage == other.storage
    run_beside(back, [], 1)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_that_decouples_its_decay_is_adamw(decoupled):
    params = parameters("cpu")
    theirs = torch.optim.Adam(params, weight_decay=0.1)
    for group in theirs.param_groups:
        group["decoupled_weight_decay"] = decoupled
    assert type(swap(theirs)) is (AdamW if decoupled else Adam)


def test_what_is_not_served_is_refused_and_nothing_changes():
    params = parameters("cpu")

    class Own(torch.optim.AdamW):
        pass

    double = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    differentiable = torch.optim.AdamW(params, differentiable=True)
    mixed = torch.optim.Adam([{"params": params[:1], "decoupled_weight_decay": True}, {"params": params[1:]}])
    broken = torch.optim.SGD(params, momentum=0.9)
    give_gradients(params)
    broken.step()
    broken.state[params[1]]["momentum_buffer"] = torch.zeros(3)
    tensor_decay = torch.optim.SGD(params, weight_decay=torch.tensor(0.1))
    plain = torch.optim.AdamW(params)
    released, accumulated = AdamW(params), torch.optim.AdamW(params)
    release_gradients(released)
    GradAccumulator(accumulated)
    rows = [
        (Own(params), {}, TypeError, "Own; swap takes"),
        (torch.optim.Adagrad(params), {}, TypeError, "Adagrad; swap takes"),
        (double, {}, TypeError, "parameter 0 of group 0 is a .* tensor of torch.float64"),
        (differentiable, {}, ValueError, "group 0 is differentiable"),
        (mixed, {}, ValueError, "decoupled_weight_decay differs"),
        (broken, {}, ValueError, r"momentum_buffer of parameter \d+ has shape \(3,\)"),
        (tensor_decay, {}, TypeError, "weight_decay is a tensor"),
        (released, {}, ValueError, "released inside backward, which would go on stepping it"),
        (accumulated, {}, ValueError, "optimizer has a GradAccumulator"),
        (plain, {"lr": 0.1, "fused": True}, TypeError, "swap takes max_grad_norm.*, not fused, lr"),
        (plain, {"state_dtype": torch.float16}, ValueError, "state_dtype is torch.float16"),
        (plain, {"max_grad_norm": -1.0}, ValueError, "max_grad_norm is -1.0"),
    ]
    for optimizer, overrides, error, message in rows:
        state, kept = dict(optimizer.state), [dict(group) for group in optimizer.param_groups]
        with pytest.raises(error, match=message):
            swap(optimizer, **overrides)
        assert dict(optimizer.state) == state
        assert optimizer.param_groups == kept


def test_a_swapped_optimizer_s_state_goes_to_torch_and_back():
    params = parameters("cpu")
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    run_beside(theirs, [], 1)
    ours = swap(theirs)
    run_beside(ours, [], 1)
    again = torch.optim.SGD(copies(params), lr=1.0)
    again.load_state_dict(through_a_file(ours.state_dict()))
    twin = SGD(copies(params), lr=1.0)
    twin.load_state_dict(again.state_dict())
    run_beside(ours, [again, twin], 2)
    for listed in zip(params, members(again), members(twin), strict=True):
        torch.testing.assert_close(listed[0], listed[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(listed[0], listed[2])
    assert snapshot(ours)[0] == snapshot(twin)[0]


@pytest.mark.parametrize("storage", [{}, {"master_weights": "split"}], ids=["fp32", "split"])
@pytest.mark.parametrize("way", ["load", "swap"])
def test_a_master_that_torch_s_optimizer_carried_along_is_out_of_date(way, storage):
    params = parameters("cpu", torch.bfloat16)
    first = AdamW(params, lr=0.1)
    run_beside(first, [], 1)
    theirs = torch.optim.AdamW(params, lr=0.1)
    theirs.load_state_dict(first.state_dict())
    run_beside(theirs, [], 3)
    if way == "load":
        ours = AdamW(params, lr=0.1, **storage)
        ours.load_state_dict(theirs.state_dict())
    else:
        ours = swap(theirs, **storage)
    before = list(map(bits, params))
    for group in ours.param_groups:
        group["lr"] = 0.0
    run_beside(ours, [], 1)
    assert list(map(bits, params)) == before
