"""``mixft.optim.AdamW`` against ``torch.optim.AdamW``, and what it adds: masters, clipping, exact skipping."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode

from mixft.optim import AdamW

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(17,), (5, 7), (), (1000,), (2, 3, 3, 3)]
BAD = [float("nan"), float("inf"), -float("inf")]


def parameters(device, dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def give_gradients(params, scale=1.0):
    for param in params:
        param.grad = (scale * torch.randn(param.shape, device=param.device)).to(param.dtype)


def copies(params, dtype):
    return [torch.nn.Parameter(param.detach().to(dtype, copy=True)) for param in params]


def run_beside(optimizer, others, steps, before_step=lambda: None):
    """Step ``optimizer`` and each of ``others`` on the same gradients, cast to the others' dtypes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(steps):
        give_gradients(params)
        before_step()
        for other in others:
            twins = [param for group in other.param_groups for param in group["params"]]
            for param, twin in zip(params, twins, strict=True):
                twin.grad = param.grad.to(twin.dtype)
            other.step()
        optimizer.step()


def snapshot(optimizer):
    """Every bit that a step may change, as bytes, so that NaN equals itself."""

    def bits(tensor):
        return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()

    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
    return [bits(param) for param in params], state


class RefuseSync(TorchDispatchMode):
    """Fails on the operators by which the host waits for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_five_steps_match_torch_in_fp64(device, dtype, amsgrad, maximize, weight_decay):
    options = {"lr": 2.0**-7, "amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay}
    params = parameters(device, dtype, SHAPES[:3])
    ours = AdamW(params, **options)
    exact = torch.optim.AdamW(copies(params, torch.float64), **options)
    single = torch.optim.AdamW(copies(params, torch.float32), **options)
    run_beside(ours, [exact, single], 5)
    for param, in_fp64, in_fp32 in zip(params, *(o.param_groups[0]["params"] for o in (exact, single)), strict=True):
        state = ours.state[param]
        weight = state["master"] if dtype != torch.float32 else param
        assert_within_budget(weight, in_fp64, in_fp32, epsilon=3e-7)
        assert torch.equal(param, weight.to(dtype))
        for name in ours.state_names(options):
            assert_within_budget(state[name], exact.state[in_fp64][name], single.state[in_fp32][name], epsilon=3e-7)
        assert state["step"].item() == 5


def test_without_masters_the_parameter_itself_is_rounded(device):
    params = parameters(device, torch.bfloat16)
    optimizer = AdamW(params, lr=2.0**-3, master_weights="none")
    before = [param.detach().double() for param in params]
    give_gradients(params)
    optimizer.step()
    assert all("master" not in optimizer.state[param] for param in params)
    for param, start in zip(params, before, strict=True):
        sign = param.grad.double().sign()
        exact = start * (1 - 2.0**-3 * 1e-2) - 2.0**-3 * sign
        assert_within_budget(param, exact, exact.bfloat16(), epsilon=1e-4)


def test_masters_collect_updates_too_small_for_the_parameter(device):
    param = torch.nn.Parameter(torch.ones(17, device=device, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.0)
    for _ in range(40):
        param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["master"], torch.full((17,), 1 - 40e-4, device=device))
    assert torch.equal(param, optimizer.state[param]["master"].bfloat16())
    assert (param != 1).all()


def test_a_parameter_may_change_its_dtype(device):
    param = torch.nn.Parameter(torch.randn(17, device=device).half())
    optimizer = AdamW([param], lr=0.1)
    for dtype in (torch.float16, torch.float32, torch.float16):
        param.data = param.data.to(dtype)
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert ("master" in optimizer.state[param]) == (dtype != torch.float32)
        before, param.grad = param.detach().clone(), torch.zeros_like(param)
        optimizer.step()
        assert (param - before).abs().max() < 0.2, "an old master came back"
    assert optimizer.state[param]["step"].item() == 6


def test_groups_dtypes_layouts_and_missing_gradients(device):
    def make():
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

    def groups(params):
        return [{"params": params[:4], "lr": 2.0**-6}, {"params": params[4:], "weight_decay": 0.3, "maximize": True}]

    params = make()
    ours = AdamW(groups(params), lr=2.0**-7)
    exact = torch.optim.AdamW(groups(copies(params, torch.float64)), lr=2.0**-7)
    run_beside(ours, [exact], 2)
    twins = [twin for group in exact.param_groups for twin in group["params"]]
    for round_ in range(2):
        give_gradients(params)
        params[1].grad = None
        params[3].grad = torch.randn(9, 4, device=device).t()
        params[4].grad = torch.randn(2, 3, 5, 7, device=device)
        params[6].grad = torch.randn(1, 1, device=device).expand(8, 3)
        if round_:
            params[0].grad = None
        for param, twin in zip(params, twins, strict=True):
            twin.grad = None if param.grad is None else param.grad.double()
        ours.step()
        exact.step()
    assert ours.state[params[1]]["step"].item() == 2
    assert ours.state[params[0]]["step"].item() == 3
    for param, twin in zip(params, twins, strict=True):
        weight = ours.state[param].get("master", param)
        torch.testing.assert_close(weight.double(), twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_schedulers_and_closures(device, lr):
    params = parameters(device)
    ours = AdamW(params, lr=copy.deepcopy(lr))
    exact = torch.optim.AdamW(copies(params, torch.float64), lr=0.01)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, exact)]
    for _ in range(3):
        run_beside(ours, [exact], 1)
        for schedule in schedules:
            schedule.step()
    for param, twin in zip(params, exact.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param.double(), twin, rtol=1e-5, atol=1e-6)

    def closure():
        assert torch.is_grad_enabled()
        ours.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    assert ours.step(closure).requires_grad
    ours.zero_grad()
    assert all(param.grad is None for param in params)


def test_a_group_can_be_added_later(device):
    params = parameters(device)
    ours = AdamW(params[:2], lr=0.01)
    exact = torch.optim.AdamW(copies(params[:2], torch.float64), lr=0.01)
    run_beside(ours, [exact], 1)
    ours.add_param_group({"params": params[2:], "lr": 0.1})
    exact.add_param_group({"params": copies(params[2:], torch.float64), "lr": 0.1})
    run_beside(ours, [exact], 2)
    twins = [twin for group in exact.param_groups for twin in group["params"]]
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.double(), twin, rtol=1e-5, atol=1e-6)


def test_hooks_run(device):
    params = parameters(device)
    optimizer = AdamW(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    give_gradients(params)
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_is_torch_s_over_all_groups(device, dtype, max_norm):
    params = parameters(device, dtype)
    options = {"lr": 2.0**-7, "eps": 0.1}
    ours = AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=max_norm, **options)
    twins = copies(params, torch.float64)
    exact = torch.optim.AdamW(twins, **options)
    for _ in range(3):
        give_gradients(params, scale=3.0)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.double()
        norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        exact.step()
        ours.step()
        assert ours.last_grad_norm.shape == ()
        torch.testing.assert_close(ours.last_grad_norm.double(), norm, rtol=1e-5, atol=0)
        assert ours.last_found_inf.item() == 0
    for param, twin in zip(params, twins, strict=True):
        weight = ours.state[param].get("master", param)
        torch.testing.assert_close(weight.double(), twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_a_nonfinite_gradient_changes_no_bit(device, dtype, max_grad_norm, first):
    if dtype == "mixed":
        params = parameters(device) + parameters(device, torch.float16)
    else:
        params = parameters(device, dtype)
    optimizer = AdamW(
        [{"params": params[:3]}, {"params": params[3:], "amsgrad": True}], lr=0.1, max_grad_norm=max_grad_norm
    )
    if not first:
        give_gradients(params)
        optimizer.step()
    for value, which in zip(BAD, (0, 3, -1), strict=True):
        for where in (0, -1):
            before = [param.detach().clone() for param in params] if first else snapshot(optimizer)
            give_gradients(params)
            params[which].grad.view(-1)[where] = value
            optimizer.step()
            assert optimizer.last_found_inf.shape == ()
            assert optimizer.last_found_inf.item() == 1
            if first:
                assert all(map(torch.equal, before, params))
                assert all(optimizer.state[param]["step"].item() == 0 for param in params)
                assert all((optimizer.state[param]["exp_avg"] == 0).all() for param in params)
            else:
                assert snapshot(optimizer) == before
    before = [param.detach().clone() for param in params]
    give_gradients(params)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 0
    assert not any(map(torch.equal, before, params))


def test_a_norm_beyond_fp32_skips(device):
    params = parameters(device)
    optimizer = AdamW(params, max_grad_norm=1.0)
    give_gradients(params)
    optimizer.step()
    before = snapshot(optimizer)
    give_gradients(params, scale=1e30)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 1
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_step_never_reads_a_value(device, dtype, max_grad_norm):
    params = parameters(device, dtype)
    optimizer = AdamW(params, max_grad_norm=max_grad_norm)
    for lr in (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        give_gradients(params)
        with RefuseSync():
            optimizer.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), RefuseSync():
        optimizer.last_found_inf.item()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stock_grad_scaler(device, dtype, max_grad_norm):
    params = parameters(device, dtype)
    ours = AdamW(params, lr=2.0**-7, max_grad_norm=max_grad_norm)
    twins = copies(params, torch.float64)
    exact = torch.optim.AdamW(twins, lr=2.0**-7)
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
        for twin, target in zip(twins, targets, strict=True):
            twin.grad = target.double()
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(twins, max_grad_norm)
            torch.testing.assert_close(ours.last_grad_norm.double(), norm, rtol=1e-5, atol=0)
        exact.step()
    assert scales == [1024, 1024, 512, 512, 256, 256]
    for param, twin in zip(params, twins, strict=True):
        weight = ours.state[param].get("master", param)
        torch.testing.assert_close(weight.double(), twin, rtol=1e-5, atol=1e-5)


def test_grad_scaler_after_unscale(device):
    params = parameters(device)
    ours = AdamW(params, lr=0.01)
    exact = torch.optim.AdamW(copies(params, torch.float64), lr=0.01)
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
        for twin, t in zip(exact.param_groups[0]["params"], target, strict=True):
            twin.grad = t.double()
        exact.step()
    for param, twin in zip(params, exact.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param.double(), twin, rtol=1e-5, atol=1e-6)


def test_clipping_looks_again_after_the_scaler(device):
    params = parameters(device)
    optimizer = AdamW(params, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device.type)
    before = [param.detach().clone() for param in params]
    scaler.scale(sum(param.sum() for param in params)).backward()
    scaler.unscale_(optimizer)
    params[0].grad[0] = float("nan")
    scaler.step(optimizer)
    assert optimizer.last_found_inf.item() == 1
    assert all(map(torch.equal, before, params))


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_goes_to_torch_and_back(device, amsgrad):
    options = {"lr": 0.01, "amsgrad": amsgrad}
    params = parameters(device)
    ours = AdamW(params, **options)
    run_beside(ours, [], 3)
    state_dict = ours.state_dict()
    names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    assert {name for state in state_dict["state"].values() for name in state} == names
    assert {value.dtype for state in state_dict["state"].values() for value in state.values()} == {torch.float32}

    theirs = torch.optim.AdamW(copies(params, torch.float32))
    theirs.load_state_dict(through_a_file(state_dict))
    exact = torch.optim.AdamW(copies(params, torch.float64))
    exact.load_state_dict(through_a_file(state_dict))
    run_beside(ours, [theirs, exact], 2)
    back = AdamW(copies(theirs.param_groups[0]["params"], torch.float32))
    back.load_state_dict(through_a_file(theirs.state_dict()))
    assert back.param_groups[0]["lr"] == 0.01
    assert "fused" not in back.param_groups[0]
    for param, twin in zip(back.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(back.state[param]["exp_avg"], theirs.state[twin]["exp_avg"])
    run_beside(back, [theirs, exact], 2)
    for listed in zip(*(o.param_groups[0]["params"] for o in (back, theirs)), strict=True):
        torch.testing.assert_close(*listed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("via", ["state_dict", "pickle", "deepcopy"])
def test_a_restored_optimizer_goes_on_bit_for_bit(device, dtype, via):
    params = parameters(device, dtype)
    first = AdamW(params, lr=0.01, amsgrad=True, max_grad_norm=2.0)
    run_beside(first, [], 3)
    if via == "state_dict":
        second = AdamW(copies(params, dtype), max_grad_norm=2.0)
        second.load_state_dict(through_a_file(first.state_dict()))
    else:
        second = pickle.loads(pickle.dumps(first)) if via == "pickle" else copy.deepcopy(first)
    assert second.max_grad_norm == 2.0
    assert snapshot(second) == snapshot(first)
    run_beside(first, [second], 2)
    assert snapshot(second) == snapshot(first)


def test_loading_copies_the_state(device):
    params = parameters(device)
    first = AdamW(params)
    run_beside(first, [], 1)
    second = AdamW(copies(params, torch.float32))
    second.load_state_dict(first.state_dict())
    before = snapshot(first)
    run_beside(second, [], 1)
    assert snapshot(first) == before


def test_a_missing_master_is_made_and_16_bit_state_is_widened(device):
    params = parameters(device, torch.float16)
    theirs = torch.optim.AdamW(copies(params, torch.float16), foreach=False)
    run_beside(AdamW(params), [theirs], 1)
    ours = AdamW(copies(theirs.param_groups[0]["params"], torch.float16))
    ours.load_state_dict(theirs.state_dict())
    for param in ours.param_groups[0]["params"]:
        state = ours.state[param]
        assert torch.equal(state["master"], param.float())
        assert {value.dtype for value in state.values()} == {torch.float32}
    run_beside(ours, [], 1)


def test_masters_are_ignored_by_torch_and_dropped_where_none_are_kept(device):
    params = parameters(device, torch.float16)
    ours = AdamW(params)
    run_beside(ours, [], 1)
    theirs = torch.optim.AdamW(copies(params, torch.float16), foreach=False)
    theirs.load_state_dict(ours.state_dict())
    run_beside(ours, [theirs], 1)
    plain = AdamW(copies(params, torch.float16), master_weights="none")
    plain.load_state_dict(ours.state_dict())
    assert all("master" not in state for state in plain.state.values())
    run_beside(plain, [], 1)


def test_state_that_does_not_fit_is_refused_and_nothing_changes(device):
    params = parameters(device)
    optimizer = AdamW(params)
    run_beside(optimizer, [], 1)
    before = snapshot(optimizer)
    wrong_shape = optimizer.state_dict()
    wrong_shape["state"][1] = wrong_shape["state"][1] | {"exp_avg": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 has shape \(3, 3\)"):
        optimizer.load_state_dict(wrong_shape)
    other = torch.optim.SGD(copies(params, torch.float32), momentum=0.9)
    run_beside(optimizer, [other], 0)
    give_gradients(other.param_groups[0]["params"])
    other.step()
    with pytest.raises(ValueError, match="lacks step, exp_avg"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr is a tensor of shape"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.9)}, "betas is"),
        ({"betas": (0.9, -0.1)}, "betas is"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"master_weights": "split"}, "master_weights is 'split'; it must be one of auto, fp32, none"),
    ],
)
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_parameters_of_other_dtypes_are_refused(dtype):
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=f"tensor of {dtype}"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"max_grad_norm": 1.0}, {"fused": True}])
def test_bad_groups(option):
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=next(iter(option))):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **option})
    assert len(optimizer.param_groups) == 1


def test_unknown_options_and_sparse_gradients_are_refused():
    table = torch.nn.Embedding(5, 3, sparse=True)
    with pytest.raises(TypeError, match="state_dtype"):
        AdamW(table.parameters(), state_dtype=torch.int8)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse_coo"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_no_gradients(device):
    optimizer = AdamW(parameters(device), max_grad_norm=1.0)
    assert optimizer.step() is None
    assert not optimizer.state


def test_skip_nonfinite_off_steps_as_torch_does(device):
    start = [torch.randn(5, 7), torch.randn(3)]
    ours = [torch.nn.Parameter(tensor.to(device)) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.to(device)) for tensor in start]
    optimizer = AdamW(ours, lr=0.1, skip_nonfinite=False)
    reference = torch.optim.AdamW(theirs, lr=0.1)
    for bad in (1.0, torch.nan):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.ones_like(mine)
            mine.grad.view(-1)[1] = bad
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        assert optimizer.last_found_inf is None
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isnan().sum() == 1
        torch.testing.assert_close(mine, other, equal_nan=True)
    with pytest.raises(ValueError, match="skip_nonfinite is False; with max_grad_norm"):
        AdamW(ours, max_grad_norm=1.0, skip_nonfinite=False)


def test_skip_nonfinite_off_still_obeys_a_scaler():
    parameter = torch.nn.Parameter(torch.randn(6))
    before = parameter.detach().clone()
    optimizer = AdamW([parameter], lr=0.1, skip_nonfinite=False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((parameter * torch.inf).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.last_found_inf.item() == 1
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_default_dtypes(device, dtype):
    before = torch.get_default_dtype()
    param = torch.nn.Parameter(torch.randn(40000, device=device).half())
    optimizer = AdamW([param], lr=0.1, max_grad_norm=1.0)
    torch.set_default_dtype(dtype)
    try:
        param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[param]["step"].dtype == torch.float32
    assert optimizer.last_grad_norm.item() == pytest.approx(200.0)
