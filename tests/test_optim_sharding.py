"""``sharded_over`` in one process: the scalars, what is reduced and where, copies, and what is refused."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import RefuseSync, every_optimizer, give_gradients, members, parameters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from mixft.amp import GradAccumulator
from mixft.optim import AdamW, release_gradients, swap
from mixft.optim.scalars import step_scalars
from mixft.optim.sharding import Shards


@pytest.fixture
def lone_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("bad", [False, True])
def test_one_process_s_scalars_are_those_without_a_group(device, lone_group, max_norm, found, bad):
    grads = [torch.randn(17, device=device), torch.randn(5, 7, device=device).half()]
    if bad:
        grads[1][2, 3] = torch.nan
    given = {
        "grad_scale": torch.tensor([4.0], device=device),
        "found_inf": None if found is None else torch.tensor([found], device=device),
        "max_norm": max_norm,
    }
    alone = step_scalars({(device, None): grads}, **given)
    processes = Shards(lone_group)
    sharded = step_scalars({(device, processes): grads}, shards=[processes], **given)
    for name in ("inv_scale", "clip_coef", "found_inf", "norm"):
        torch.testing.assert_close(getattr(sharded, name), getattr(alone, name), rtol=1e-6, atol=0, equal_nan=True)
    assert list(map(torch.Tensor.tolist, sharded.nonfinite)) == list(map(torch.Tensor.tolist, alone.nonfinite))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_one_reduction_a_step_and_no_value_read(native_device, lone_group, max_grad_norm, monkeypatch):
    reduced, all_reduce = [], dist.all_reduce

    def note(tensor, group):
        reduced.append(tensor.shape)
        all_reduce(tensor, group=group)

    monkeypatch.setattr(dist, "all_reduce", note)
    params = parameters(native_device)
    optimizer = AdamW(
        [{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=max_grad_norm, sharded_over=lone_group
    )
    for _ in range(2):
        give_gradients(params)
        with RefuseSync():
            optimizer.step()
    assert reduced == [(2,), (2,)]
    optimizer.sharded_over = None
    optimizer.step()
    assert len(reduced) == 2


def test_the_reduction_is_where_the_group_s_backends_are(lone_group, monkeypatch):
    shards = Shards(lone_group)
    cpu, first, second = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    assert shards.device(cpu) == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for types, expected in ((["cpu"], [cpu, cpu, cpu]), (["cuda"], [second, first, second])):
        shards.groups = (SimpleNamespace(_device_types=list(map(torch.device, types))),)
        # Of parameters in the host's memory, on a GPU, and none.
        assert [shards.device(home) for home in (cpu, first, None)] == expected


@every_optimizer
def test_copies_keep_the_group_and_pickles_lose_it_aloud(case, lone_group):
    optimizer = case.ours(parameters("cpu"), sharded_over=lone_group)
    give_gradients(members(optimizer))
    optimizer.step()
    pickle.dumps(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert copy.deepcopy(optimizer).sharded_over is copy.copy(optimizer).sharded_over is lone_group
    with pytest.warns(RuntimeWarning, match="sharded_over is None now"):
        restored = pickle.loads(pickle.dumps(optimizer))
    assert restored.sharded_over is None
    restored.sharded_over = lone_group
    assert restored.sharded_over is optimizer.sharded_over is lone_group


def test_swap_takes_the_group_and_keeps_it(lone_group):
    first = swap(torch.optim.AdamW(parameters("cpu")), sharded_over=lone_group)
    assert first.sharded_over is lone_group
    assert swap(first, max_grad_norm=1.0).sharded_over is lone_group


def test_what_is_no_group_is_refused(lone_group, monkeypatch):
    for group in ("world", -100):
        with pytest.raises(TypeError, match=rf"sharded_over is {group!r}; it must be a torch.distributed.ProcessGroup"):
            AdamW(parameters("cpu"), sharded_over=group)
    with pytest.raises(ValueError, match="sharded_over is not an option of a parameter group of AdamW"):
        AdamW([{"params": parameters("cpu"), "sharded_over": lone_group}])
    with pytest.raises(ValueError, match=r"to a ZeroRedundancyOptimizer in functools.partial\(AdamW, sharded_over="):
        ZeroRedundancyOptimizer(parameters("cpu"), AdamW, sharded_over=lone_group)
    with pytest.raises(ValueError, match="the optimizer has sharded_over"):
        release_gradients(AdamW(parameters("cpu"), sharded_over=lone_group))
    monkeypatch.setattr(dist, "is_available", lambda: False)
    AdamW(parameters("cpu"))
    with pytest.raises(TypeError, match="sharded_over is"):
        AdamW(parameters("cpu"), sharded_over=lone_group)


def test_an_accumulator_refuses_dtensors_by_name(lone_group):
    sharded = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    plain = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"parameter 0 is a DTensor of shape \(7, 9\); GradAccumulator takes plain"):
        GradAccumulator(AdamW(sharded.parameters()))
    with pytest.raises(TypeError, match=r"parameter 1 is a DTensor"):
        GradAccumulator([plain, *sharded.parameters()])
