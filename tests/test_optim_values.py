"""The values of ``mixft.optim``'s steps against torch's own optimizers in FP64."""

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from optimizer_cases import (
    DTYPES,
    SHAPES,
    copies,
    every_optimizer,
    every_variation,
    give_gradients,
    members,
    parameters,
    run_beside,
    weight,
)
from weight_budget import assert_same_weights, flat, references

from mixft.ops.optimizer_state import join_master


@pytest.mark.parametrize("dtype", DTYPES)
@every_variation
def test_five_steps_match_the_reference_in_fp64(device, case, variation, dtype):
    options = case.options | variation
    params = parameters(device, dtype, SHAPES[:3])
    ours = case.ours(params, **options)
    exact = case.reference(copies(params, torch.float64), **options)
    single = case.reference(copies(params, torch.float32), **options)
    run_beside(ours, [exact, single], 5)
    oracles = members(exact), members(single)
    assert all(torch.equal(param, weight(ours, param).to(dtype)) for param in params)
    assert_within_budget(flat(weight(ours, param) for param in params), *map(flat, oracles), epsilon=3e-7)
    names = ours.state_names(ours.param_groups[0])
    assert set(names) == exact.state[oracles[0][0]].keys() - {"step"}
    for name in names:
        kept = (
            flat(optimizer.state[param][name] for param in members(optimizer)) for optimizer in (ours, exact, single)
        )
        assert_within_budget(*kept, epsilon=3e-7)


@every_optimizer
def test_without_masters_the_parameter_itself_is_rounded(device, case):
    params = parameters(device, torch.bfloat16)
    ours = case.ours(params, **case.options, master_weights="none")
    exact = case.reference(copies(params, torch.float64), **case.options)
    run_beside(ours, [exact], 1)
    assert all("master" not in ours.state[param] for param in params)
    for param, twin in zip(params, members(exact), strict=True):
        assert_within_budget(param, twin, twin.bfloat16(), EPSILON[torch.float32])


@every_optimizer
def test_masters_collect_updates_too_small_for_the_parameter(device, case):
    param = torch.nn.Parameter(torch.ones(17, device=device, dtype=torch.bfloat16))
    ours = case.ours([param], lr=3e-4, weight_decay=0.0)
    exact, single = references(lambda params: case.reference(params, lr=3e-4, weight_decay=0.0), [param])
    for _ in range(12):
        for optimizer in (ours, exact, single):
            for each in members(optimizer):
                each.grad = torch.ones_like(each)
            optimizer.step()
    assert_same_weights(ours, exact, single)
    assert torch.equal(param, weight(ours, param).bfloat16())
    assert (param != 1).all()


@every_optimizer
def test_a_parameter_may_change_its_dtype(device, case):
    param = torch.nn.Parameter(torch.randn(17, device=device).half())
    optimizer = case.ours([param], lr=0.1)
    for dtype in (torch.float16, torch.float32, torch.float16):
        param.data = param.data.to(dtype)
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert ("master" in optimizer.state[param]) == (dtype != torch.float32)
        before, param.grad = param.detach().clone(), torch.zeros_like(param)
        optimizer.step()
        assert (param - before).abs().max() < 0.3, "an old master came back"


def awkward_parameters(device):
    torch.manual_seed(3)
    return [
        torch.nn.Parameter(tensor)
        for tensor in (
            torch.randn(33, 17, device=device).half(),
            torch.randn(66, device=device),
            torch.randn(1001, device=device)[1:],
            torch.randn(9, 4, device=device).t(),
            torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last),
            torch.randn(0, 3, device=device),
            torch.randn(8, 6, device=device)[:, ::2],
            torch.randn(4, device=device).bfloat16(),
        )
    ]


@every_optimizer
def test_groups_dtypes_layouts_and_missing_gradients(device, case):
    def groups(params):
        return [{"params": params[:4], "lr": 2.0**-6}, {"params": params[4:], "weight_decay": 0.3}]

    params = awkward_parameters(device)
    ours = case.ours(groups(params), **case.options)
    exact, single = references(lambda params: case.reference(groups(params), **case.options), params)
    run_beside(ours, [exact, single], 2)
    for round_ in range(2):
        give_gradients(params)
        params[1].grad = None
        params[3].grad = torch.randn(9, 4, device=device).t()
        params[4].grad = torch.randn(2, 3, 5, 7, device=device)
        params[6].grad = torch.randn(1, 1, device=device).expand(8, 3)
        if round_:
            params[0].grad = None
        for optimizer in (exact, single):
            for param, twin in zip(params, members(optimizer), strict=True):
                twin.grad = None if param.grad is None else param.grad.to(twin.dtype)
            optimizer.step()
        ours.step()
    assert_same_weights(ours, exact, single)


@every_optimizer
def test_parameters_that_are_views_of_one_buffer(device, case):
    buffer = torch.randn(60, device=device)
    params = [torch.nn.Parameter(view) for view in (buffer[:17], buffer[17:42].view(5, 5), buffer[42:60:3])]
    ours = case.ours(params, **case.options)
    exact, single = references(lambda params: case.reference(params, **case.options), params)
    between = buffer[43:60:3].clone()
    run_beside(ours, [exact, single], 2)
    assert_same_weights(ours, exact, single)
    assert torch.equal(buffer[43:60:3], between), "elements between those of a parameter changed"


def test_a_parameter_zeroed_by_hand_stays_near_zero_beside_any_remainder(device):
    remainder = torch.tensor([-32768, -1, 0, 1, 32767], dtype=torch.int16, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        for zero in (0.0, -0.0):
            joined = join_master(torch.full((5,), zero, dtype=dtype, device=device), remainder)
            assert (joined.abs() <= 2.0**-24).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_optimizer
def test_other_default_dtypes(device, case, dtype):
    before = torch.get_default_dtype()
    param = torch.nn.Parameter(torch.randn(40000, device=device).half())
    optimizer = case.ours([param], lr=0.1, max_grad_norm=1.0)
    torch.set_default_dtype(dtype)
    try:
        param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in optimizer.state[param].values()} == {torch.float32}
    assert optimizer.last_grad_norm.item() == pytest.approx(200.0)
