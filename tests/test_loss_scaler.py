"""LossScaler: torch's GradScaler step by step where the options coincide, and written-out expectations elsewhere."""

import copy
import pickle

import pytest
import torch
from torch.amp import GradScaler

from mixft.amp import LossScaler
from mixft.optim import AdamW

INF, NAN = float("inf"), float("nan")
# True where the gradients of that iteration overflow.
SCRIPT = [False, False, False, True, False, True, True, False, False, False, False, False, False, True, False, False]


class ScalingSGD(torch.optim.SGD):
    """An optimizer that unscales by itself, as mixft.optim's do, and records what the scaler gave it."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self):
        self.seen = (self.grad_scale, self.found_inf.clone())
        for param in self.param_groups[0]["params"]:
            grad = param.grad if self.grad_scale is None else param.grad / self.grad_scale
            param.sub_(torch.where(self.found_inf > 0, 0.0, self.param_groups[0]["lr"] * grad).to(param.dtype))


def parameter(*values, dtype=torch.float32, device="cpu"):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype, device=device))


def iterate(scaler, optimizer, param, grad=None):
    """One iteration with the gradient ``grad`` (1 when None), set as the backward of a scaled loss would."""
    grad = torch.ones_like(param) if grad is None else grad
    param.grad = scaler.scale(grad.float()).to(param.dtype)
    scaler.step(optimizer)
    scaler.update()


def trajectory(scaler, script, make=torch.optim.SGD):
    param = parameter(1.0, 2.0)
    optimizer = make([param], lr=0.25)
    path = []
    for overflows in script:
        iterate(scaler, optimizer, param, torch.full_like(param, INF) if overflows else None)
        path.append((scaler.get_scale(), scaler._get_growth_tracker(), param.detach().clone().tolist()))
    return path


@pytest.mark.parametrize("make", [torch.optim.SGD, ScalingSGD])
def test_trajectory_is_that_of_grad_scaler(device, make):
    options = {"init_scale": 256.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
    expected = trajectory(GradScaler("cpu", **options), SCRIPT)
    scaler = LossScaler(**options, device="cpu")
    assert trajectory(scaler, SCRIPT, make) == expected
    assert scaler.overflow_steps == sum(SCRIPT)


def test_defaults_are_those_of_grad_scaler():
    scaler = LossScaler(device="cpu")
    assert isinstance(scaler, GradScaler)
    assert scaler.is_enabled()
    shared = GradScaler("cpu").state_dict()
    assert {name: scaler.state_dict()[name] for name in shared} == shared


def test_static_scale_never_changes_and_overflowing_steps_are_skipped():
    scaler = LossScaler(64, dynamic=False, growth_interval=2, device="cpu")
    path = trajectory(scaler, [False, False, False, True, True, False])
    assert [scale for scale, _, _ in path] == [64.0] * 6
    assert [values[0] for _, _, values in path] == [0.75, 0.5, 0.25, 0.25, 0.25, 0.0]
    assert scaler.overflow_steps == 2
    scaler.update(32.0)
    assert scaler.get_scale() == 32.0


def test_floor_and_ceiling():
    scaler = LossScaler(8.0, growth_interval=1, min_scale=3.0, max_scale=20.0, device="cpu")
    path = trajectory(scaler, [False, False, False, True, True, True, True, False])
    assert [scale for scale, _, _ in path] == [16.0, 20.0, 20.0, 10.0, 5.0, 3.0, 3.0, 6.0]


def test_a_scale_that_is_set_stays_within_bounds():
    scaler = LossScaler(8.0, min_scale=2.0, max_scale=32.0, device="cpu")
    scaler.scale(torch.ones(()))
    for given, kept in ((16, 16.0), (1.0, 2.0), (torch.tensor(4.0), 4.0), (torch.tensor([64.0]), 32.0)):
        scaler.update(given)
        assert scaler.get_scale() == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unscale_accepts_every_dtype(device, dtype):
    param = parameter(1.0, 2.0, 3.0, dtype=dtype, device=device)
    optimizer = torch.optim.SGD([param], lr=1.0)
    scaler = LossScaler(1024.0, device=device.type)
    scaler.scale(param.float().sum()).backward()
    assert torch.equal(param.grad, torch.full_like(param, 1024))
    scaler.unscale_(optimizer)
    assert torch.equal(param.grad, torch.ones_like(param))
    scaler.step(optimizer)
    assert param.tolist() == [0.0, 1.0, 2.0]
    assert scaler.overflow_steps == 0


@pytest.mark.parametrize("make", [torch.optim.SGD, ScalingSGD])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_element_skips_the_step(device, dtype, bad, make):
    first = parameter(1.0, 2.0, device=device)
    second = parameter(*range(17), dtype=dtype, device=device)
    optimizer = make([first, second], lr=1.0)
    before = [first.clone(), second.clone()]
    scaler = LossScaler(4.0, device=device.type)
    scaler.scale(torch.ones((), device=device))
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    second.grad[11] = bad
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert (scaler.get_scale(), scaler.overflow_steps) == (2.0, 1)


def test_an_optimizer_that_unscales_gets_scale_and_flag(device):
    param = parameter(1.0, 2.0, dtype=torch.float16, device=device)
    optimizer = ScalingSGD([param], lr=1.0)
    scaler = LossScaler(8.0, device=device.type)
    scaler.scale(param.float().sum()).backward()
    scaler.step(optimizer)
    assert [value.item() for value in optimizer.seen] == [8.0, 0.0]
    assert torch.equal(param.grad, torch.full_like(param, 8.0))
    assert param.tolist() == [0.0, 1.0]
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    scaler.update()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.seen[0] is None
    assert param.tolist() == [-1.0, 0.0]


def test_nothing_reads_the_device_with_an_optimizer_that_unscales(monkeypatch):
    param = parameter(1.0, 2.0)
    optimizer = ScalingSGD([param], lr=1.0)
    scaler = LossScaler(8.0, device="cpu")
    scaler.scale(param.sum()).backward()

    def refuse(tensor):
        raise AssertionError("a value was read on the host")

    for reader in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, reader, refuse)
    zero = torch.zeros(())
    found = (zero, zero, zero, torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr("mixft.amp.gradients.grad_scalars_unchecked", lambda *_: found)
    scaler.step(optimizer)
    scaler.update()


def test_each_optimizer_is_skipped_on_its_own():
    fine, overflowing = parameter(1.0), parameter(1.0)
    optimizers = [torch.optim.SGD([fine], lr=0.5), torch.optim.AdamW([overflowing]), ScalingSGD([fine], lr=0.25)]
    scaler = LossScaler(4.0, device="cpu")
    scaler.scale(torch.ones(()))
    fine.grad, overflowing.grad = torch.tensor([4.0]), torch.tensor([NAN])
    scaler.unscale_(optimizers[1])
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    # The first optimizer unscales the gradient that the third one unscales again.
    assert (fine.item(), overflowing.item()) == (1 - 0.5 - 0.25 / 4, 1.0)
    assert not optimizers[1].state
    assert (scaler.get_scale(), scaler.overflow_steps) == (2.0, 1)


def test_sparse_gradients():
    embedding = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float16)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    before = embedding.weight.detach().clone()
    scaler = LossScaler(16.0, device="cpu")
    scaler.scale(embedding(torch.tensor([1, 1, 3])).float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    change = torch.tensor([0, 2, 0, 1, 0]).half()[:, None].expand(5, 2)
    torch.testing.assert_close(before - embedding.weight, change, rtol=0, atol=2e-3)
    # Two finite values of one index whose sum is beyond FP16.
    embedding.weight.grad = torch.sparse_coo_tensor(
        [[1, 1]], torch.full((2, 2), 4e4).half(), (5, 2), check_invariants=True
    )
    before = embedding.weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(embedding.weight, before)
    assert scaler.overflow_steps == 1


def test_scale_of_nested_outputs(device):
    scaler = LossScaler(4.0, device=device.type)
    one, half = torch.ones(2, device=device), torch.ones(3, device=device, dtype=torch.float16)
    scaled = scaler.scale([one, (half, [one])])
    assert type(scaled) is list
    assert type(scaled[1]) is tuple
    for tensor, dtype in ((scaled[0], torch.float32), (scaled[1][0], torch.float16), (scaled[1][1][0], torch.float32)):
        assert tensor.dtype == dtype
        assert (tensor == 4).all()
    with pytest.raises(ValueError, match="Tensor or an iterable"):
        scaler.scale(3.0)


def test_disabled_passes_everything_through():
    scaler = LossScaler(enabled=False, device="cpu")
    param = parameter(1.0)
    optimizer = torch.optim.SGD([param], lr=0.5)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    param.grad = torch.tensor([INF])
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert param.item() == -INF
    assert (scaler.get_scale(), scaler.is_enabled(), scaler.state_dict(), scaler.overflow_steps) == (1.0, False, {}, 0)
    scaler.load_state_dict({})


def changed_scaler():
    scaler = LossScaler(96.0, 3.0, 0.75, 4, min_scale=0.5, max_scale=1000.0, device="cpu")
    trajectory(scaler, SCRIPT)
    return scaler


@pytest.mark.parametrize("started", [False, True])
def test_state_dict_round_trip(started):
    source = changed_scaler()
    state = copy.deepcopy(source.state_dict())
    restored = LossScaler(dynamic=False, device="cpu")
    if started:
        trajectory(restored, [True, False])
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert state["overflow_steps"] == sum(SCRIPT)
    assert trajectory(restored, SCRIPT) == trajectory(source, SCRIPT)
    assert restored.state_dict() == source.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies(copied):
    source = changed_scaler()
    twin = copied(source)
    assert twin.state_dict() == source.state_dict()
    assert trajectory(twin, SCRIPT) == trajectory(source, SCRIPT)
    assert twin.overflow_steps == source.overflow_steps == 2 * sum(SCRIPT)


def test_state_goes_to_grad_scaler_and_back():
    source = changed_scaler()
    stock = GradScaler("cpu")
    stock.load_state_dict(source.state_dict())
    assert stock.state_dict().items() <= source.state_dict().items()
    back = LossScaler(device="cpu", min_scale=2.0, max_scale=1000.0, init_scale=4.0)
    back.load_state_dict(stock.state_dict())
    assert back.get_scale() == stock.get_scale()
    back.load_state_dict(stock.state_dict() | {"scale": 1e-9})
    assert back.get_scale() == 2.0


def test_calls_in_the_wrong_order_fail_as_grad_scaler_s_do():
    param = parameter(1.0)
    optimizer = torch.optim.SGD([param], lr=0.5)
    for scaler in (GradScaler("cpu"), LossScaler(device="cpu"), LossScaler(device="cpu", dynamic=False)):
        for call in (lambda s=scaler: s.step(optimizer), lambda s=scaler: s.unscale_(optimizer), scaler.update):
            with pytest.raises(AssertionError, match="_scale is None"):
                call()
        scaler.scale(torch.ones(()))
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            scaler.update()
        with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
            scaler.step(optimizer)
    for make in (lambda: GradScaler("cpu"), lambda: LossScaler(device="cpu")):
        scaler = make()
        scaler.scale(torch.ones(()))
        param.grad = torch.ones(1)
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="Closure"):
            scaler.step(optimizer, closure=lambda: None)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
            scaler.step(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
            scaler.unscale_(optimizer)
        with pytest.raises(AssertionError, match="may only be pickled"):
            pickle.dumps(scaler)
        scaler.update()
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="source state dict is empty"):
            scaler.load_state_dict({})


def test_failed_step_is_not_counted():
    param = parameter(1.0)
    optimizer = torch.optim.SGD([param], lr=0.5)
    scaler = LossScaler(device="cpu")
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([NAN])
    scaler.step(optimizer)
    with pytest.raises(RuntimeError):
        scaler.step(optimizer)
    assert scaler.overflow_steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth_factor": 1.0}, "growth_factor must be above 1; it is 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor must be between 0 and 1"),
        ({"backoff_factor": 0.0}, "backoff_factor must be between 0 and 1"),
        ({"growth_interval": 0}, "growth_interval must be at least 1; it is 0"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"init_scale": 0.5}, "min_scale <= init_scale"),
        ({"init_scale": 2.0**25}, "max_scale"),
        ({"init_scale": NAN}, "init_scale"),
        ({"max_scale": INF}, "finite max_scale"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LossScaler(**options, device="cpu")


@pytest.mark.parametrize("name", ["init_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis"])
def test_what_is_no_number_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name} is '2'; it must be a number"):
        LossScaler(**{name: "2"}, device="cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cpu")])
def test_a_device_in_the_place_that_gradscaler_has_it_in_is_refused_with_the_remedy(device):
    with pytest.raises(TypeError, match=f"the device is a keyword here: device='{device}'"):
        LossScaler(device)


@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
def test_fp16_training_that_overflows_skips_exactly_and_recovers(make):
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 4).half()
    inputs = torch.randn(64, 8)
    targets = inputs @ torch.randn(8, 4)
    optimizer = make(model.parameters(), lr=0.05, eps=1e-4)
    scaler = LossScaler(2.0**22, growth_interval=20, device="cpu")
    losses, skipped = [], []
    for _ in range(80):
        params, state = [param.clone() for param in model.parameters()], copy.deepcopy(tensors(optimizer))
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs.half()).float(), targets)
        scaler.scale(loss).backward()
        overflow = any(not param.grad.isfinite().all() for param in model.parameters())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        unchanged = [torch.equal(*pair) for pair in zip(params, model.parameters(), strict=True)]
        if overflow:
            assert all(unchanged)
            assert all(torch.equal(value, tensors(optimizer)[name]) for name, value in state.items())
            assert scaler.get_scale() == scale / 2
        else:
            assert not any(unchanged)
        skipped.append(overflow)
        losses.append(loss.item())
    assert skipped[0]
    assert 0 < sum(skipped) < 40
    assert scaler.overflow_steps == sum(skipped)
    assert losses[-1] < 0.1 * losses[0]
    assert all(param.isfinite().all() for param in model.parameters())


def tensors(optimizer):
    """Every state tensor of ``optimizer``, by position of its parameter and name."""
    return {
        (position, name): value
        for position, state in enumerate(optimizer.state.values())
        for name, value in state.items()
    }
