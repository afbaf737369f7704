"""GradAccumulator with layers that add to main_grad in their backward: the same sums, skips and reports."""

import copy
import pickle

import pytest
import torch
from conftest import EPSILON, assert_within_budget
from torch.nn.functional import linear

import mixft.optim
from mixft.amp import GradAccumulator, LossScaler
from mixft.nn import Linear

INF = float("inf")
BATCHES = 4


class Network(torch.nn.Module):
    """Two layers that add to main_grad, one of them with a transposed buffer, and one that does not."""

    def __init__(self, device, dtype=torch.float16):
        super().__init__()
        self.first = Linear(17, 20, activation="relu", device=device, dtype=dtype, fuse_wgrad_accumulation=True)
        self.second = Linear(20, 33, False, device=device, dtype=dtype, fuse_wgrad_accumulation=True)
        self.third = torch.nn.Linear(33, 3, device=device, dtype=dtype)
        self.first.weight.main_grad = torch.full((20, 17), INF, device=device)
        self.second.weight.main_grad = torch.ones(20, 33, device=device).t()

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def inputs(device, dtype=torch.float16, count=BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 17, generator=generator).to(device, dtype) for _ in range(count)]


def gradient_sums(network, batches, dtype):
    """torch's gradients at ``dtype``, each batch's by itself, and their sums in FP32 or more."""
    params = [param.detach().to(dtype).requires_grad_() for param in network.parameters()]
    first, bias, second, third, third_bias = params
    sums = [torch.zeros_like(param, dtype=torch.promote_types(dtype, torch.float32)) for param in params]
    for x in batches:
        out = linear(linear(linear(x.to(dtype), first, bias).relu(), second), third, third_bias)
        for total, gradient in zip(sums, torch.autograd.grad(out.sum(), params), strict=True):
            total += gradient
    return sums


def assert_sums(found, network, batches, dtype=torch.float32):
    """Hold sums of gradients to the error of torch's at ``dtype``."""
    exact, own = (gradient_sums(network, batches, kind) for kind in (torch.float64, dtype))
    for buffer, truth, theirs in zip(found, exact, own, strict=True):
        assert_within_budget(buffer, truth, theirs, EPSILON[dtype])


def snapshot(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in (*params, *state)]


MAKERS = {
    "mixft": lambda network: mixft.optim.AdamW(network.named_parameters(), lr=0.01),
    "mixft, clipped": lambda network: mixft.optim.AdamW(network.named_parameters(), lr=0.01, max_grad_norm=0.5),
    "torch": lambda network: torch.optim.AdamW(network.named_parameters(), lr=0.01, eps=1e-4),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_those_in_fp64_whatever_becomes_of_the_scale(device, dtype):
    """The scale changes between micro-batches, once to a number that is no power of two, once by loading."""
    network, batches = Network(device, dtype), inputs(device, dtype)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(network.parameters(), scaler)
    assert accumulator.buffers[0] is network.first.weight.main_grad
    changes = [
        lambda: scaler.update(96.0),
        lambda: scaler.load_state_dict(scaler.state_dict() | {"scale": 4.0}),
        lambda: scaler.update(1024.0),
        lambda: None,
    ]
    for x, change in zip(batches, changes, strict=True):
        scaler.scale(network(x).sum()).backward()
        accumulator.accumulate()
        assert all(param.grad is None for param in network.parameters())
        change()
    assert_sums(accumulator.buffers, network, batches, dtype)
    assert list(accumulator.gradients()) == list(network.parameters())
    accumulator.reset()
    assert not network.first.weight.main_grad.any()
    assert accumulator.gradients() == {}


@every_optimizer
def test_steps_are_those_of_a_network_that_does_not_fuse(device, make):
    networks = [Network(device, torch.float32) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for layer in (networks[1].first, networks[1].second):
        layer.fuse_wgrad_accumulation = False
        del layer.weight.main_grad
    optimizers = list(map(make, networks))
    scalers = [LossScaler(64.0, growth_interval=2, device=device.type) for _ in networks]
    accumulators = list(map(GradAccumulator, optimizers, scalers))
    for _ in range(3):
        for network, optimizer, scaler, accumulator in zip(networks, optimizers, scalers, accumulators, strict=True):
            for x in inputs(device, torch.float32):
                scaler.scale(network(x).square().mean()).backward()
                accumulator.accumulate()
            scaler.step(optimizer)
            scaler.update()
    for ours, theirs in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [scaler.overflow_steps for scaler in scalers] == [0, 0]
    assert scalers[0].get_scale() == 128


@pytest.mark.parametrize("spoilt_batch", range(BATCHES))
@every_optimizer
def test_an_overflow_skips_the_step_exactly_and_is_named(device, make, spoilt_batch):
    network = Network(device)
    optimizer = make(network)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)

    def iterate(spoilt):
        for number, x in enumerate(inputs(device)):
            scaler.scale(network(x).square().mean()).backward()
            if number == spoilt:
                network.second.weight.main_grad[4, 2:5] = INF
            accumulator.accumulate()
        scaler.step(optimizer)
        scaler.update()

    iterate(None)
    before = snapshot(optimizer)
    iterate(spoilt_batch)
    assert all(map(torch.equal, snapshot(optimizer), before))
    assert (scaler.get_scale(), scaler.overflow_steps) == (4.0, 1)
    assert scaler.overflow_report() == [("second.weight", 3)]
    iterate(None)
    assert not torch.equal(network.second.weight, before[2])
    assert all(tensor.isfinite().all() for tensor in snapshot(optimizer))
    assert scaler.overflow_steps == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_without_a_gradient_is_not_stepped(device, scaled):
    network = Network(device, torch.float32)
    optimizer = mixft.optim.AdamW(network.parameters(), lr=0.01)
    scaler = LossScaler(8.0, enabled=scaled, device=device.type)
    GradAccumulator(optimizer, scaler)
    before = [param.detach().clone() for param in network.parameters()]
    hidden = torch.ones(5, 20, device=device)
    for _ in range(2):
        scaler.scale(network.third(network.second(hidden)).sum()).backward()
        optimizer.grad_accumulator.accumulate()
    scaler.step(optimizer)
    moved = [not torch.equal(param, kept) for param, kept in zip(network.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, True]


def test_without_a_scaler_an_overflow_skips_and_sums_may_be_read_at_any_time(device):
    network = Network(device, torch.float32)
    optimizer = mixft.optim.SGD(network.parameters(), lr=1.0)
    accumulator = GradAccumulator(optimizer)
    batches = inputs(device, torch.float32)
    for x in batches:
        network(x).sum().backward()
        accumulator.accumulate()
        assert len(accumulator.gradients()) == len(accumulator.buffers)
    assert_sums(accumulator.buffers, network, batches)
    network.first.weight.main_grad[0, 0] = INF
    accumulator.accumulate()
    assert accumulator.gradients()[network.first.weight].isinf().sum() == 1
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 1
    assert all(map(torch.equal, snapshot(optimizer), before))


@pytest.mark.parametrize("scaled", [False, True])
def test_another_default_dtype(device, scaled):
    network = Network(device, torch.float32)
    optimizer = mixft.optim.SGD(network.parameters(), lr=1.0)
    scaler = LossScaler(device=device.type) if scaled else None
    accumulator = GradAccumulator(optimizer, scaler)
    loss = network(inputs(device, torch.float32)[0]).sum()
    torch.set_default_dtype(torch.float64)
    try:
        (scaler.scale(loss) if scaled else loss).backward()
        accumulator.accumulate()
        (scaler.step(optimizer) if scaled else optimizer.step())
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.last_found_inf.item() == 0


def test_a_weight_that_another_layer_uses_too(device):
    """The embedding's part comes as .grad, the layer's in main_grad."""
    layer = Linear(8, 12, False, device=device, fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros(12, 8, device=device)
    optimizer = mixft.optim.SGD(layer.parameters(), lr=1.0)
    scaler = LossScaler(32.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)
    twins = [layer.weight.detach().to(dtype, copy=True).requires_grad_() for dtype in (torch.float64, torch.float32)]
    tokens = torch.tensor([3, 3, 11], device=device)
    for clear in (True, False):
        scaler.scale(layer(layer.weight[tokens].detach()).sum() + layer.weight[tokens].sum()).backward()
        for twin in twins:
            ((twin[tokens].detach() @ twin.t()).sum() + twin[tokens].sum()).backward()
        accumulator.accumulate(set_to_none=clear)
        assert layer.weight.grad is None if clear else not layer.weight.grad.any()
    assert_within_budget(accumulator.buffers[0], *(twin.grad for twin in twins), EPSILON[torch.float32])
    assert list(accumulator.gradients()) == [layer.weight]


def test_a_group_that_is_added_later(device):
    network = Network(device, torch.float32)
    optimizer = mixft.optim.SGD(network.first.parameters(), lr=1.0)
    accumulator = GradAccumulator(optimizer)
    optimizer.add_param_group({"params": [*network.second.parameters(), *network.third.parameters()]})
    network.second.weight.main_grad.zero_()
    batches = inputs(device, torch.float32, 2)
    for x in batches:
        network(x).sum().backward()
        accumulator.accumulate()
    assert_sums(accumulator.buffers, network, batches)


def test_compiled_backwards_are_seen(device):
    network = Network(device, torch.float32)
    accumulator = GradAccumulator(network.parameters())
    batches = inputs(device, torch.float32, 2)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager")
    for x in batches:
        compiled(x).sum().backward()
        accumulator.accumulate()
    gradients = accumulator.gradients()
    assert_sums([gradients[param] for param in network.parameters()], network, batches)


def test_a_scaler_is_copied_and_pickled_without_the_sums(device):
    network = Network(device, torch.float32)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(network.parameters(), scaler)
    scaler.scale(network(inputs(device, torch.float32)[0]).sum()).backward()
    accumulator.accumulate()
    kept = network.first.weight.main_grad.clone()
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        other.scale(torch.ones((), device=device))
        other.update(64.0)
    assert torch.equal(network.first.weight.main_grad, kept)
    scaler.update(16.0)
    assert torch.equal(network.first.weight.main_grad, 2 * kept)


def test_refused(device):
    network, x = Network(device, torch.float32), inputs(device, torch.float32)[0]
    optimizer = mixft.optim.SGD(network.parameters(), lr=1.0)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(optimizer, scaler)
    scaler.scale(network(x).sum()).backward()
    for param in network.third.parameters():
        param.grad = None
    with pytest.raises(RuntimeError, match=r"3 parameters have a gradient that was not added"):
        optimizer.step()
    accumulator.accumulate()
    assert accumulator.buffers[0].any()
    scaler.scale(network(x).sum()).backward()
    with pytest.raises(RuntimeError, match="main_grad of parameter 0 after the loss scale was taken out"):
        accumulator.accumulate()
    accumulator.reset()
    network.second.weight.main_grad = torch.zeros(33, 20, device=device)
    with pytest.raises(RuntimeError, match="main_grad of parameter 2 was set or replaced after"):
        accumulator.accumulate()
    accumulator.remove()
    network.second.weight.main_grad = torch.zeros(33, 20, device=device).half()
    with pytest.raises(TypeError, match=r"main_grad of parameter 2 is torch.float16 \(33, 20\) on .*; it must be"):
        GradAccumulator(optimizer)
    for unfit in (torch.zeros(20, 33), torch.zeros(33, 40)[:, ::2]):
        network.second.weight.main_grad = unfit.to(device)
        with pytest.raises(ValueError, match=r"it must be \(33, 20\) on .*, as the parameter is, and have no gaps"):
            GradAccumulator(optimizer)


def test_every_micro_batch_may_reach_other_layers(device):
    network = Network(device)
    scaler = LossScaler(8.0, device=device.type)
    accumulator = GradAccumulator(network.parameters(), scaler)
    x = inputs(device)[0]
    between = network.first(x).detach()
    for loss in (network.first(x).sum(), network.second(between).sum()):
        scaler.scale(loss).backward()
        accumulator.accumulate()
    gradients = accumulator.gradients()
    for layer, left, right in (
        (network.first, (between > 0).t(), x),
        (network.second, torch.ones(33, 6, device=device), between),
    ):
        exact, own = (left.to(dtype) @ right.to(dtype) for dtype in (torch.float64, torch.float32))
        assert_within_budget(gradients[layer.weight], exact, own, EPSILON[torch.float32])


def test_what_is_read_before_the_last_micro_batch_is_not_counted_twice(device):
    network = Network(device)
    accumulator = GradAccumulator(network.parameters())
    batches = inputs(device, count=2)
    batches[0][0, 0] = float("nan")
    for x in batches:
        network(x).sum().backward()
        accumulator.accumulate()
        counts = dict.fromkeys(network.parameters(), 0)
        for params, found in accumulator.counts():
            for param, count in zip(params, found.tolist(), strict=True):
                counts[param] += count
        weight = network.first.weight
        assert counts[weight] == (~weight.main_grad.isfinite()).sum() > 0
