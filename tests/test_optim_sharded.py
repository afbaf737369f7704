"""Optimizers that step shards of one model in two processes: one norm, one decision, and no process left waiting."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import (
    BAD,
    bits,
    every_optimizer,
    every_storage,
    give_gradients,
    members,
    snapshot,
    through_a_file,
)
from process_pair import ProcessPair
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from mixft.amp import GradAccumulator, LossScaler
from mixft.optim import SGD, AdamW


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = ProcessPair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.GELU(), torch.nn.Linear(7, 5))


def zero_beside_one_process(kind, **options):
    """An optimizer of every rank's shards by ZeRO, and the same of a whole model."""
    sharded = functools.partial(kind, sharded_over=dist.group.WORLD, **options)
    ours, whole = model(), model()
    return (
        ours,
        ZeroRedundancyOptimizer(ours.parameters(), sharded, lr=0.1),
        kind(whole.parameters(), lr=0.1, **options),
    )


def step_both(zero, one, seed, scale=1.0, bad=None):
    """Step on the same gradients, which every rank has, as after DistributedDataParallel; ``bad`` is put into one."""
    torch.manual_seed(seed)
    give_gradients(members(zero), scale)
    if bad is not None:
        which, value = bad
        members(zero)[which].grad.view(-1)[-1] = value
    for param, twin in zip(members(zero), members(one), strict=True):
        twin.grad = param.grad.clone()
    zero.step()
    one.step()


def skipping_under_zero(rank, kind, max_grad_norm):
    ours, zero, one = zero_beside_one_process(kind, max_grad_norm=max_grad_norm)
    assert 0 < len(members(zero.optim)) < len(members(zero))
    for round_of_steps in range(2):
        step_both(zero, one, seed=round_of_steps)
        before = snapshot(zero.optim), list(map(bits, ours.parameters()))
        for which in range(len(members(zero))):
            step_both(zero, one, seed=which, bad=(which, BAD[which % len(BAD)]))
            assert zero.optim.last_found_inf.item() == 1
            assert (snapshot(zero.optim), list(map(bits, ours.parameters()))) == before
        step_both(zero, one, seed=7)
        assert zero.optim.last_found_inf.item() == 0
        assert (snapshot(zero.optim), list(map(bits, ours.parameters()))) != before
        for param, twin in zip(members(zero), members(one), strict=True):
            tolerance = 0 if max_grad_norm is None else 1e-6
            torch.testing.assert_close(param, twin, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@every_optimizer
def test_a_nan_in_one_rank_s_shard_changes_no_bit_on_any(pair, case, max_grad_norm):
    pair.call(skipping_under_zero, case.ours, max_grad_norm)


def clipping_under_zero(rank, max_grad_norm):
    _, zero, one = zero_beside_one_process(SGD, max_grad_norm=max_grad_norm)
    for seed in range(3):
        step_both(zero, one, seed, scale=30.0)
        torch.testing.assert_close(zero.optim.last_grad_norm, one.last_grad_norm, rtol=1e-6, atol=0)
    for param, twin in zip(members(zero), members(one), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)
    return zero.optim.last_grad_norm.item()


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6, float("inf")])
def test_clipping_under_zero_is_that_of_one_process(pair, max_grad_norm):
    norms = pair.call(clipping_under_zero, max_grad_norm)
    assert norms[0] == norms[1] > 30


def resumed_under_zero(rank, kind, storage):
    sharded = functools.partial(kind, sharded_over=dist.group.WORLD, max_grad_norm=0.5, **storage)

    def steps(zero, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            give_gradients(members(zero))
            zero.step()

    first, second = model().bfloat16(), model().bfloat16()
    zero, resumed = (ZeroRedundancyOptimizer(each.parameters(), sharded, lr=0.1) for each in (first, second))
    steps(zero, range(2))
    zero.consolidate_state_dict(0)
    saved = [copy.deepcopy(zero.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    steps(resumed, range(7, 9))
    second.load_state_dict(first.state_dict())
    # On a CPU both sides of ZeRO's take the very tensors.
    resumed.load_state_dict(through_a_file(saved[0]))
    for optimizer in (zero, resumed):
        steps(optimizer, range(2, 4))
    assert list(map(bits, second.parameters())) == list(map(bits, first.parameters()))
    assert snapshot(resumed.optim) == snapshot(zero.optim)
    assert dtypes_of(resumed.optim) == dtypes_of(zero.optim)


def dtypes_of(optimizer):
    state = [optimizer.state[param] for param in members(optimizer)]
    return [{name: value.dtype for name, value in values.items()} for values in state]


@every_storage
@every_optimizer
def test_zero_goes_on_from_a_state_dictionary(pair, case, storage):
    pair.call(resumed_under_zero, case.ours, storage)


def fsdp_beside_one_process(rank, max_grad_norm, bad):
    inputs = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 40.0]).view(2, 1, 1)
    whole = model()
    one = AdamW(whole.parameters(), lr=0.1, max_grad_norm=max_grad_norm)
    sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    ours = AdamW(sharded.parameters(), lr=0.1, max_grad_norm=max_grad_norm, sharded_over=dist.group.WORLD)
    for step in range(3):
        # FSDP takes the mean over the ranks.
        (sum(whole(part).square().sum() for part in inputs) / 2).backward()
        sharded(inputs[rank]).square().sum().backward()
        if bad and step == 1:
            # In a parameter that lies on one rank.
            whole[2].bias.grad[0] = torch.nan
            for param, grad in shards_of(sharded, "2.bias"):
                grad[0] = torch.nan
                assert param.numel() > 0
        for optimizer in (one, ours):
            optimizer.step()
            optimizer.zero_grad()
        assert ours.last_found_inf.item() == one.last_found_inf.item() == (bad and step == 1)
    with FullyShardedDataParallel.summon_full_params(sharded):
        for param, twin in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-5)
    return None if max_grad_norm is None else ours.last_grad_norm.item()


def shards_of(sharded, name):
    """The parameters called ``name`` of which this rank has a part, with their gradients."""
    named = [(param, param.grad) for found, param in sharded.named_parameters() if found.endswith(name)]
    return [(param, grad) for param, grad in named if grad is not None and grad.numel() > 0]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_fsdp_with_original_parameters_steps_as_one_process(pair, max_grad_norm, bad):
    norms = pair.call(fsdp_beside_one_process, max_grad_norm, bad)
    assert norms[0] == norms[1]


def one_rank_without(rank, has_parameters, value, options):
    """Rank 1 has no gradient, or nothing that could have one."""
    params = [torch.nn.Parameter(torch.ones(3))] if rank == 0 or has_parameters else []
    optimizer = SGD([{"params": params}], lr=1.0, sharded_over=dist.group.WORLD, **options)
    if rank == 0:
        params[0].grad = torch.tensor([3.0, 0.0, value])
    optimizer.step()
    assert rank == 0 or all(torch.equal(param, torch.ones(3)) for param in params)
    return optimizer.last_found_inf.item(), None if not options else optimizer.last_grad_norm.item()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["check", "clip"])
@pytest.mark.parametrize("has_parameters", [False, True])
def test_a_rank_without_gradients_takes_part(pair, has_parameters, options):
    for value, found in ((4.0, 0.0), (torch.inf, 1.0)):
        seen = pair.call(one_rank_without, has_parameters, value, options)
        norm = None if not options else 5.0 if found == 0 else torch.inf
        assert seen == [(found, norm)] * 2


def scaled_shards(rank, ways):
    """What a LossScaler makes of three steps of which the second overflows, in the shard of rank 0."""
    name = f"shard {rank}"
    params = [torch.nn.Parameter(torch.ones(2))] if rank == 0 or "has none" not in ways else []
    clipping = {"max_grad_norm": 2.0} if "clips" in ways else {}
    optimizer = SGD([{"params": [(name, param) for param in params]}], 1.0, sharded_over=dist.group.WORLD, **clipping)
    scaler = LossScaler(16.0, device="cpu")
    accumulator = GradAccumulator(optimizer, scaler) if "accumulates" in ways else None
    scales = []
    for overflows in (False, True, False):
        scaler.scale(torch.ones(()))
        for param in params:
            param.grad = torch.full((2,), scaler.get_scale() * (3 + rank))
            if overflows and rank == 0:
                param.grad[1] = torch.inf
        if accumulator is not None:
            accumulator.accumulate()
        elif "unscales" in ways:
            scaler.unscale_(optimizer)
        before = [param.detach().clone() for param in params]
        scaler.step(optimizer)
        assert optimizer.last_found_inf.item() == overflows
        assert all(torch.equal(new, old) == overflows for new, old in zip(params, before, strict=True))
        optimizer.zero_grad()
        scaler.update()
        scales.append(scaler.get_scale())
    norm = optimizer.last_grad_norm.item() if clipping else None
    return scales, scaler.overflow_report(), scaler.overflow_steps, norm


@pytest.mark.parametrize("ways", ["", "clips", "unscales", "unscales clips", "accumulates", "accumulates clips"])
def test_a_loss_scaler_backs_off_on_every_rank(pair, ways):
    first, second = pair.call(scaled_shards, ways)
    norm = pytest.approx(50**0.5, rel=1e-6) if "clips" in ways else None
    assert first == ([16.0, 8.0, 8.0], [("shard 0", 1)], 1, norm)
    assert second == ([16.0, 8.0, 8.0], [], 1, norm)


@pytest.mark.parametrize("ways", ["has none", "has none clips", "has none unscales"])
def test_a_loss_scaler_of_a_rank_without_gradients_backs_off(pair, ways):
    first, second = pair.call(scaled_shards, ways)
    assert first[0] == second[0] == [16.0, 8.0, 8.0]


def accumulated_without_a_scaler(rank):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([param], lr=1.0, sharded_over=dist.group.WORLD)
    accumulator = GradAccumulator(optimizer)
    if rank == 0:
        param.grad = torch.tensor([1.0, torch.nan])
        accumulator.accumulate()
    optimizer.step()
    skipped = optimizer.last_found_inf.item()
    param.grad = torch.ones(2)
    accumulator.accumulate()
    optimizer.step()
    return skipped, param.tolist()


def test_sums_that_one_rank_alone_has(pair):
    assert pair.call(accumulated_without_a_scaler) == [(1.0, [0.0, 0.0])] * 2


def stepped_by_a_scaler_alone(rank):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([param], lr=1.0, skip_nonfinite=False, sharded_over=dist.group.WORLD)
    param.grad = torch.tensor([1.0, torch.nan if rank == 1 else 1.0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    after_scaler = param.tolist()
    param.grad = torch.ones(2)
    optimizer.step()
    return after_scaler, param.tolist(), optimizer.last_found_inf


def test_a_scaler_s_finding_is_shared_and_unchecked_steps_share_nothing(pair):
    assert pair.call(stepped_by_a_scaler_alone) == [([1.0, 1.0], [0.0, 0.0], None)] * 2
