"""GradAccumulator: FP32 sums of micro-batch gradients, steps with them, and overflow in one of the micro-batches."""

import copy
import pickle

import pytest
import torch
from conftest import error

import mixft.optim
from mixft.amp import GradAccumulator, LossScaler

INF, NAN = float("inf"), float("nan")
MAKERS = {
    "torch SGD": lambda params: torch.optim.SGD(params, lr=0.5),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "mixft SGD": lambda params: mixft.optim.SGD(params, lr=0.5),
    "mixft AdamW": lambda params: mixft.optim.AdamW(params, lr=0.01),
    "mixft AdamW, clipped": lambda params: mixft.optim.AdamW(params, lr=0.01, max_grad_norm=0.5),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameters(device, dtype=torch.float32):
    """Contiguous, transposed and empty parameters."""
    values = [torch.randn(17), torch.randn(5, 3).t(), torch.randn(0, 4), torch.randn(66)]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def named(params):
    return [(f"layer{number}.weight", param) for number, param in enumerate(params)]


def backward(params, scaler, factors, spoilt=None):
    """What the backward of a loss ``sum(param * factor)`` leaves; one element of parameter ``spoilt`` is Inf."""
    for number, (param, factor) in enumerate(zip(params, factors, strict=True)):
        grad = scaler.scale(factor) if scaler is not None else factor
        param.grad = grad.to(param.dtype)
        if number == spoilt:
            param.grad.view(-1)[-1] = INF


def micro_batches(params, count):
    return [[torch.randn(param.shape).to(param.device) for param in params] for _ in range(count)]


def snapshot(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in (*params, *state)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_64_micro_batches_match_fp64_where_16_bit_accumulation_drifts(device, dtype):
    generator = torch.Generator().manual_seed(5)
    batches = [(1 + torch.rand(300, generator=generator)).to(device, dtype) for _ in range(64)]
    exact = torch.stack([batch.double() for batch in batches]).sum(0)
    plain = torch.nn.Parameter(torch.zeros(300, dtype=dtype, device=device))
    ours = torch.nn.Parameter(torch.zeros(300, dtype=dtype, device=device))
    accumulator = GradAccumulator([ours])
    for batch in batches:
        (plain * batch).sum().backward()
        (ours * batch).sum().backward()
        accumulator.accumulate()
    errors = {
        "plain": error(plain.grad, exact) / exact.max().item(),
        "FP32 buffers": error(accumulator.buffers[0], exact) / exact.max().item(),
    }
    print(f"64 {dtype} micro-batches, relative error: {errors}")
    assert errors["plain"] > (1e-3 if dtype == torch.float16 else 1e-2)
    assert errors["FP32 buffers"] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_optimizer
def test_steps_are_those_on_the_summed_gradients(device, make, dtype):
    params = parameters(device, dtype)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer, reference = make(params), make(twins)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)
    for _ in range(3):
        batches = [[factor.to(dtype).float() for factor in factors] for factors in micro_batches(params, 4)]
        for factors in batches:
            backward(params, scaler, factors)
            accumulator.accumulate()
            assert all(param.grad is None for param in params)
        sums = [torch.stack(factors).sum(0) for factors in zip(*batches, strict=True)]
        for buffer, total in zip(accumulator.buffers, sums, strict=True):
            assert buffer.dtype == torch.float32
            torch.testing.assert_close(buffer, total, rtol=1e-6, atol=1e-6)
        scaler.step(optimizer)
        scaler.update()
        for twin, total in zip(twins, sums, strict=True):
            twin.grad = total.to(dtype)
        reference.step()
        assert all(param.grad is None for param in params)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin, **tolerance)
    assert scaler.overflow_steps == 0


@pytest.mark.parametrize("spoilt_batch", [0, 1, 2])
@every_optimizer
def test_an_overflow_in_any_micro_batch_skips_the_whole_step_and_is_named(device, make, spoilt_batch):
    params = parameters(device, torch.float16)
    optimizer = make(named(params))
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)

    def iterate(spoilt=None):
        for number, factors in enumerate(micro_batches(params, 3)):
            backward(params, scaler, factors, 1 if number == spoilt else None)
            accumulator.accumulate()
        scaler.step(optimizer)
        scaler.update()

    iterate()
    before = snapshot(optimizer)
    iterate(spoilt_batch)
    assert all(map(torch.equal, snapshot(optimizer), before))
    assert (scaler.get_scale(), scaler.overflow_steps) == (4.0, 1)
    assert scaler.overflow_report() == [("layer1.weight", 1)]
    iterate()
    assert not torch.equal(params[0], before[0])
    assert all(tensor.isfinite().all() for tensor in snapshot(optimizer))
    assert (scaler.get_scale(), scaler.overflow_steps) == (4.0, 1)


def test_a_scale_that_changes_between_micro_batches(device):
    params = parameters(device, torch.float16)
    scaler = LossScaler(8.0, device=device.type)
    optimizer = mixft.optim.SGD(params, lr=1.0)
    accumulator = GradAccumulator(optimizer, scaler)
    for scale in (8.0, 2.0, 64.0):
        scaler.scale(torch.ones((), device=device))
        scaler.update(scale)
        backward(params, scaler, [torch.ones(param.shape, device=device) for param in params])
        accumulator.accumulate()
    assert all((buffer == 3).all() for buffer in accumulator.buffers)


def test_overflows_of_several_micro_batches_and_parameters_add_up():
    params = parameters("cpu", torch.float16)
    optimizer = torch.optim.SGD(named(params), lr=0.1)
    scaler = LossScaler(8.0, device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    for factors, spoilt in zip(micro_batches(params, 4), (3, 0, 3, 0), strict=True):
        backward(params, scaler, factors, spoilt)
        if spoilt == 0:
            params[3].grad = None
        accumulator.accumulate()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report() == [("layer0.weight", 2), ("layer3.weight", 2)]


@every_optimizer
def test_parameters_without_a_gradient_are_not_stepped_and_late_ones_are(device, make):
    params = parameters(device)
    optimizer = make(params)
    accumulator = GradAccumulator(optimizer)
    for step in range(2):
        before = [param.detach().clone() for param in params]
        ones = [torch.ones_like(param) for param in params]
        for wanted in ((0,), (0, 1)):
            for position in wanted:
                params[position].grad = ones[position].clone()
            accumulator.accumulate()
        assert list(accumulator.gradients()) == params[:2]
        assert (accumulator.buffers[0] == 2).all(), step
        assert (accumulator.buffers[1] == 1).all(), step
        optimizer.step()
        moved = [not torch.equal(param, kept) for param, kept in zip(params, before, strict=True)]
        assert moved == [True, True, False, False]


@pytest.mark.parametrize("make", [MAKERS["mixft SGD"], MAKERS["mixft AdamW, clipped"]])
def test_without_a_scaler_an_overflow_skips_mixft_s_step(device, make):
    params = parameters(device, torch.bfloat16)
    optimizer = make(params)
    accumulator = GradAccumulator(optimizer)
    before = snapshot(optimizer)
    for spoilt in (None, 0):
        backward(params, None, [torch.ones(param.shape, device=device) for param in params], spoilt)
        accumulator.accumulate()
    optimizer.step()
    assert optimizer.last_found_inf.item() == 1
    assert not hasattr(optimizer, "found_inf")
    assert all(map(torch.equal, snapshot(optimizer)[: len(params)], before))


@every_optimizer
def test_gradients_that_stay_in_place(make):
    params = parameters("cpu")
    optimizer = make(params)
    scaler = LossScaler(2.0, device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    for param in params:
        param.grad = torch.zeros_like(param)
    addresses = [param.grad.data_ptr() for param in params]
    for _ in range(2):
        for _ in range(2):
            for param in params:
                param.grad += scaler.scale(torch.ones_like(param))
            accumulator.accumulate(set_to_none=False)
        assert all((buffer == 2).all() for buffer in accumulator.buffers)
        scaler.step(optimizer)
        scaler.update()
        assert [param.grad.data_ptr() for param in params] == addresses
        assert not any(param.grad.any() for param in params)


def test_a_group_that_is_added_later():
    params = parameters("cpu")
    optimizer = mixft.optim.SGD(params[:2], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    optimizer.add_param_group({"params": params[2:]})
    before = [param.detach().clone() for param in params]
    backward(params, None, [torch.ones(param.shape) for param in params])
    accumulator.accumulate()
    optimizer.step()
    assert all(torch.equal(param, kept - 1) for param, kept in zip(params, before, strict=True))


def test_nothing_is_read_on_the_host(monkeypatch):
    params = parameters("cpu", torch.float16)
    optimizer = mixft.optim.AdamW(params)
    scaler = LossScaler(8.0, device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    backward(params, scaler, [torch.ones(param.shape) for param in params])

    def refuse(tensor):
        raise AssertionError("a value was read on the host")

    monkeypatch.setattr("mixft.amp.grad_accumulator.accumulate_unchecked_", lambda *args, **kwargs: None)
    monkeypatch.setattr("mixft.optim.base.step_unchecked_", lambda *args: None)
    for reader in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, reader, refuse)
    accumulator.accumulate()
    scaler.step(optimizer)
    scaler.update()


def test_removed_the_optimizer_steps_with_gradients_again():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = mixft.optim.SGD([param], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    param.grad = torch.ones(3)
    accumulator.accumulate()
    optimizer.step()
    assert torch.equal(param, torch.zeros(3))
    accumulator.remove()
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param, torch.full((3,), -1.0))
    GradAccumulator(optimizer)


def test_a_disabled_scaler():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=1.0)
    scaler = LossScaler(enabled=False, device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    for _ in range(2):
        scaler.scale(param.sum()).backward()
        accumulator.accumulate()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.full((3,), -1.0))


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's, which is an optimizer by name only."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_refusals():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = mixft.optim.SGD([param], lr=1.0)
    scaler = LossScaler(device="cpu")
    with pytest.raises(TypeError, match="scaler is a GradScaler"):
        GradAccumulator(optimizer, torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match=r"is a Linear; give its optimizer or its parameters\(\)"):
        GradAccumulator(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"parameter 0 is a tuple; give tensors"):
        GradAccumulator(torch.nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match="parameters 0 and 2 are the same tensor; give it once"):
        GradAccumulator([param, torch.nn.Parameter(torch.ones(2)), param])
    with pytest.raises(TypeError, match="is a Wrapper, which wraps an optimizer; give that one"):
        GradAccumulator(Wrapper(optimizer))
    with pytest.raises(ValueError, match="holds no parameters"):
        GradAccumulator([])
    with pytest.raises(TypeError, match=r"parameter 1 is a dense tensor of torch\.float64"):
        GradAccumulator([param, torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    accumulator = GradAccumulator(optimizer, scaler)
    with pytest.raises(ValueError, match="has a GradAccumulator already"):
        GradAccumulator(optimizer)
    param.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="_scale is None"):
        accumulator.accumulate()
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="1 parameters have a gradient that was not added"):
        optimizer.step()
    other = LossScaler(device="cpu")
    other.scale(torch.ones(()))
    with pytest.raises(ValueError, match="made without this scaler"):
        other.step(optimizer)
    with pytest.raises(RuntimeError, match="a closure cannot be used"):
        optimizer.step(lambda: None)
    param.grad = torch.eye(3)[0].to_sparse()
    with pytest.raises(TypeError, match="gradient of parameter 0 is a "):
        accumulator.accumulate()


def test_a_parameter_that_was_given_another_shape_is_refused():
    params = [torch.nn.Parameter(torch.ones(size)) for size in (3, 40)]
    accumulator = GradAccumulator(params)
    params[1].data = torch.ones(10)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"gradient of parameter 1 has shape \(10,\) and its buffer \(40,\)"):
        accumulator.accumulate()
    assert not any(buffer.any() for buffer in accumulator.buffers)


@pytest.mark.parametrize("kind", [mixft.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_the_sums_are_clipped(device, kind, norm_type):
    params = parameters(device)
    before = [param.detach().clone() for param in params]
    optimizer = kind(params, lr=1.0)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)
    batches = micro_batches(params, 3)
    for factors in batches:
        backward(params, scaler, factors)
        accumulator.accumulate()
    exact = [sum(parts) for parts in zip(*(map(torch.Tensor.double, factors) for factors in batches), strict=True)]
    total = torch.nn.utils.get_total_norm(exact, norm_type)
    norm = accumulator.clip_grad_norm_(0.5, norm_type)
    assert abs(norm.item() - total.item()) < 1e-5 * total.item()
    scaler.step(optimizer)
    scaler.update()
    for param, old, grad in zip(params, before, exact, strict=True):
        torch.testing.assert_close(param.double(), old.double() - grad * (0.5 / total), rtol=1e-5, atol=1e-6)
    backward(params, scaler, [torch.full_like(param, torch.nan) for param in params])
    accumulator.accumulate()
    with pytest.raises(RuntimeError, match=r"the norm of order 2\.0 of the gradients is nan"):
        accumulator.clip_grad_norm_(0.5, error_if_nonfinite=True)


def test_what_would_clip_nothing_is_said(device):
    params = parameters(device)
    optimizer = mixft.optim.AdamW(params)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)
    backward(params, scaler, micro_batches(params, 1)[0])
    accumulator.accumulate()
    with pytest.raises(RuntimeError, match="sums are unscaled already; leave this call out, and clip with"):
        scaler.unscale_(optimizer)
    with pytest.warns(UserWarning, match="none of the 4 parameters has a gradient, so nothing was clipped"):
        assert mixft.amp.clip_grad_norm_(params, 1.0).item() == 0.0
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("again", ["step", "reset"])
@pytest.mark.parametrize("kind", [mixft.optim.SGD, torch.optim.SGD])
def test_after_a_step_that_failed_nothing_of_it_is_left(device, kind, again):
    (param,) = params = [torch.nn.Parameter(torch.ones(3, device=device))]
    optimizer = kind(params, lr=0.5)
    accumulator = GradAccumulator(optimizer)
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    for factor in (1.0, torch.nan):
        param.grad = torch.full_like(param, factor)
        accumulator.accumulate()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        if again == "step":
            break
        accumulator.reset()
        assert param.grad is None
        assert getattr(optimizer, "found_inf", None) is None
        assert getattr(optimizer, "main_grads", None) is None
    failing.remove()
    if again == "reset":
        param.grad = torch.ones_like(param)
        accumulator.accumulate()
    optimizer.step()
    assert param.tolist() == [0.5] * 3
    assert param.grad is None


def test_a_backward_after_a_step_that_failed_is_refused(device):
    (param,) = params = [torch.nn.Parameter(torch.ones(3, device=device))]
    optimizer = torch.optim.SGD(params, lr=0.5)
    accumulator = GradAccumulator(optimizer)
    param.grad = torch.ones_like(param)
    accumulator.accumulate()
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    param.grad += 1
    with pytest.raises(RuntimeError, match="the optimizer's last step raised an error"):
        accumulator.accumulate()


def test_a_parameter_that_joins_a_group_in_the_middle_is_summed(device):
    params = parameters(device)
    optimizer = mixft.optim.SGD([{"params": params[:1]}, {"params": params[1:2]}], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    optimizer.param_groups[0]["params"].append(params[3])
    before = params[3].detach().clone()
    for param in (params[0], params[1], params[3]):
        param.grad = torch.ones_like(param)
    accumulator.accumulate()
    assert params[3].grad is None
    optimizer.step()
    assert torch.equal(params[3], before - 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_group_that_is_taken_away_is_left_alone(device, set_to_none):
    params = parameters(device)
    optimizer = mixft.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    for is_second in (False, True):
        if is_second:
            accumulator.accumulate(set_to_none)
            del optimizer.param_groups[1]
        backward(params, None, [torch.ones_like(param) for param in params])
    accumulator.accumulate(set_to_none)
    assert [param.grad is None for param in params] == [set_to_none, set_to_none, False, False]
    assert list(map(id, accumulator.gradients())) == list(map(id, params[:2]))
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for position, (param, kept) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, kept - 2 if position < 2 else kept)


def through_a_pickle(given):
    return pickle.loads(pickle.dumps(given))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_pickle])
def test_a_copy_goes_on_with_the_copied_optimizer(copied):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = mixft.optim.SGD([param], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    param.grad = torch.ones(3)
    accumulator.accumulate()
    other, its_optimizer, its_accumulator = copied((param, optimizer, accumulator))
    for each, steps in ((other, 3), (param, 1)):
        its = (its_optimizer, its_accumulator) if each is other else (optimizer, accumulator)
        for _ in range(steps):
            each.grad = torch.ones(3)
            its[1].accumulate()
        its[0].step()
        assert torch.equal(each, torch.full((3,), -1.0 - steps))
    with pytest.raises(ValueError, match="has a GradAccumulator already"):
        GradAccumulator(its_optimizer)


def test_sums_outlive_zero_grad_and_not_reset():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = mixft.optim.SGD([param], lr=1.0)
    accumulator = GradAccumulator(optimizer)
    for give_up, expected in ((optimizer.zero_grad, -101.0), (accumulator.reset, -102.0)):
        for value in (100.0, 1.0):
            param.grad = torch.full((3,), value)
            accumulator.accumulate()
            if value == 100.0:
                give_up()
        optimizer.step()
        assert torch.equal(param, torch.full((3,), expected))
