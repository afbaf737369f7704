"""State dictionaries, pickles and copies: to ``torch.optim`` and back, and on bit for bit."""

import copy
import pickle

import pytest
import torch
from optimizer_cases import (
    STORAGES,
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

from mixft.optim import SGD, Adam, AdamW, Lion


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


@every_variation
def test_state_goes_to_the_reference_and_back(device, case, variation):
    options = case.options | variation
    params = parameters(device)
    ours = case.ours(params, **options)
    run_beside(ours, [], 3)
    state_dict = ours.state_dict()
    expected = set(ours.state_names(ours.param_groups[0]))
    assert all(set(state) - {"step"} == expected for state in state_dict["state"].values())
    assert {value.dtype for state in state_dict["state"].values() for value in state.values()} <= {torch.float32}

    theirs = case.reference(copies(params, torch.float32), lr=0.5)
    theirs.load_state_dict(through_a_file(state_dict))
    exact = case.reference(copies(params, torch.float64), lr=0.5)
    exact.load_state_dict(through_a_file(state_dict))
    run_beside(ours, [theirs, exact], 2)
    back = case.ours(copies(members(theirs), torch.float32), lr=0.5)
    back.load_state_dict(through_a_file(theirs.state_dict()))
    assert back.param_groups[0]["lr"] == options["lr"]
    assert "fused" not in back.param_groups[0]
    for param, twin in zip(members(back), members(theirs), strict=True):
        for name in expected:
            assert torch.equal(back.state[param][name], theirs.state[twin][name])
    run_beside(back, [theirs, exact], 2)
    for listed in zip(members(back), members(theirs), strict=True):
        torch.testing.assert_close(*listed, rtol=1e-6, atol=1e-6)


def assert_goes_on_like(second, first):
    assert (second.max_grad_norm, second.storage) == (first.max_grad_norm, first.storage)
    assert snapshot(second) == snapshot(first)
    run_beside(first, [second], 1)
    assert snapshot(second) == snapshot(first)


@every_storage
@every_optimizer
def test_a_restored_optimizer_goes_on_bit_for_bit(device, case, storage):
    params = mixed_parameters(device)
    first = case.ours(params, **case.options | case.variations[-1], **storage, max_grad_norm=2.0)
    run_beside(first, [], 2)
    second = case.ours(copies(params), lr=1.0, **storage, max_grad_norm=2.0)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert_goes_on_like(second, first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@every_optimizer
def test_a_copied_optimizer_goes_on_bit_for_bit(case, copied):
    first = case.ours(mixed_parameters("cpu"), **case.options, **STORAGES["split-int8-state"], max_grad_norm=2.0)
    run_beside(first, [], 2)
    assert_goes_on_like(copied(first), first)


@every_optimizer
def test_names_of_parameters_travel(case):
    model = torch.nn.Linear(3, 2)
    optimizer = case.ours(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    give_gradients(model.parameters())
    optimizer.step()
    other = case.ours(torch.nn.Linear(3, 2).named_parameters())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


@every_optimizer
def test_loading_copies_the_state(device, case):
    params = parameters(device)
    first = case.ours(params, **case.options)
    run_beside(first, [], 1)
    second = case.ours(copies(params, torch.float32), **case.options)
    second.load_state_dict(first.state_dict())
    before = snapshot(first)
    run_beside(second, [], 1)
    assert snapshot(first) == before


@every_optimizer
def test_a_missing_master_is_made_and_16_bit_state_is_widened(device, case):
    params = parameters(device, torch.float16)
    theirs = case.reference(copies(params, torch.float16), **case.options)
    run_beside(case.ours(params), [theirs], 1)
    ours = case.ours(copies(members(theirs), torch.float16))
    ours.load_state_dict(theirs.state_dict())
    for param in members(ours):
        state = ours.state[param]
        assert torch.equal(state["master"], param.float())
        assert {value.dtype for value in state.values()} == {torch.float32}
    run_beside(ours, [], 1)


@every_optimizer
def test_masters_are_ignored_by_torch_and_dropped_where_none_are_kept(device, case):
    params = parameters(device, torch.float16)
    ours = case.ours(params, **case.options)
    run_beside(ours, [], 1)
    theirs = case.reference(copies(params, torch.float16), **case.options)
    theirs.load_state_dict(ours.state_dict())
    run_beside(ours, [theirs], 1)
    plain = case.ours(copies(params, torch.float16), master_weights="none")
    plain.load_state_dict(ours.state_dict())
    assert all("master" not in state for state in plain.state.values())
    run_beside(plain, [], 1)


@every_optimizer
def test_state_that_does_not_fit_is_refused_and_nothing_changes(device, case):
    params = parameters(device)
    optimizer = case.ours(params, **case.options)
    run_beside(optimizer, [], 1)
    before = snapshot(optimizer)
    name = optimizer.state_names(optimizer.param_groups[0])[0]
    wrong_shape = optimizer.state_dict()
    wrong_shape["state"][1] = wrong_shape["state"][1] | {name: torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=rf"{name} of parameter 1 has shape \(3, 3\)"):
        optimizer.load_state_dict(wrong_shape)
    other = torch.optim.Adagrad(copies(params, torch.float32))
    with pytest.raises(ValueError, match=f"lacks .*{name}"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert snapshot(optimizer) == before


def test_a_master_loaded_into_a_remainder_sets_the_parameter(device):
    first = AdamW(mixed_parameters(device), lr=0.1)
    run_beside(first, [], 2)
    second = AdamW(mixed_parameters(device), lr=0.1, master_weights="split")
    second.load_state_dict(through_a_file(first.state_dict()))
    for param, twin in zip(members(first)[:6], members(second)[:6], strict=True):
        torch.testing.assert_close(weight(second, twin), weight(first, param), rtol=0, atol=2.0**-40)


def test_loaded_hyperparameters_are_read_once_and_refused_where_there_are_none_such():
    params = parameters("cpu")
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    theirs = torch.optim.AdamW(params, betas=betas, foreach=False)
    run_beside(AdamW(copies(params)), [theirs], 1)
    ours = AdamW(copies(params))
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["betas"] == (0.5, 0.75)
    assert type(ours.param_groups[0]["betas"][0]) is float

    decayed = torch.optim.SGD(params, weight_decay=torch.tensor(0.5)).state_dict()
    decoupled = torch.optim.Adam(params).state_dict()
    decoupled["param_groups"][0]["decoupled_weight_decay"] = True
    rows = [
        (SGD(params), decayed, TypeError, "the loaded weight_decay is a tensor"),
        (
            Adam(params),
            decoupled,
            ValueError,
            "decoupled_weight_decay is True, that of AdamW, from which",
        ),
    ]
    for optimizer, saved, error, message in rows:
        before = [dict(group) for group in optimizer.param_groups]
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups == before


@pytest.mark.parametrize(("saved", "loading"), [(AdamW, Adam), (Adam, AdamW), (AdamW, Lion), (Adam, SGD)])
def test_a_state_of_another_rule_is_refused(saved, loading):
    state = saved(parameters("cpu")).state_dict()
    assert "decoupled_weight_decay" not in saved(parameters("cpu")).param_groups[0]
    with pytest.raises(ValueError, match=f"that of {saved.__name__}, from which {loading.__name__} does not go on"):
        loading(parameters("cpu")).load_state_dict(state)
    theirs = getattr(torch.optim, saved.__name__)(parameters("cpu"))
    theirs.load_state_dict(state)
    assert theirs.param_groups[0]["decoupled_weight_decay"] == (saved is AdamW)


@every_optimizer
def test_an_option_that_a_saved_group_lacks_is_as_this_optimizer_was_made(case):
    params = parameters("cpu")
    first = case.ours(params, **case.options)
    run_beside(first, [], 1)
    saved = first.state_dict()
    del saved["param_groups"][0]["maximize"]
    second = case.ours(copies(params), maximize=True)
    second.load_state_dict(saved)
    assert second.param_groups[0]["maximize"] is True
    run_beside(second, [], 1)


def test_a_state_dictionary_from_before_momentum_was_switched_on():
    params = parameters("cpu")
    ours, theirs = SGD(params, lr=0.1), torch.optim.SGD(copies(params), lr=0.1)
    run_beside(ours, [theirs], 1)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["momentum"] = 0.9
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    run_beside(ours, [theirs], 3)
    for param, twin in zip(params, members(theirs), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)
