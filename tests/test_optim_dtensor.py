"""Optimizers on DTensors, as ``fully_shard`` makes them, in two processes: the pieces stepped as those of one model."""

import copy

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import BAD, every_optimizer, every_storage, give_gradients, members, snapshot
from process_pair import ProcessPair
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mixft import PrecisionController, PrecisionPolicy
from mixft.amp import LossScaler
from mixft.optim import SGD, AdamW, release_gradients, swap

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# Seven rows are four and three, one row is one and none.
SHAPES = [(7, 9), (7,), (1, 7), (), (4, 3, 2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = ProcessPair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def pieces(tensors):
    return [tensor.to_local().detach() for tensor in tensors]


def divided(dtype=torch.float32, shapes=SHAPES):
    """Parameters divided over both processes by their first dimension; without one each has all of it."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(shape).to(dtype) for shape in shapes]
    return [
        torch.nn.Parameter(distribute_tensor(each, mesh, [Shard(0) if each.dim() else Replicate()])) for each in whole
    ]


def give_divided_gradients(params, seed, bad=None):
    """The same gradients on every process; ``bad`` is (parameter, value) for its last element."""
    torch.manual_seed(seed)
    for position, param in enumerate(params):
        whole = torch.randn(param.shape).to(param.dtype)
        if bad is not None and bad[0] == position:
            whole.view(-1)[-1] = bad[1]
        param.grad = distribute_tensor(whole, param.device_mesh, param.placements)


def beside_plain_pieces(rank, kind, options):
    # Whatever is replicated is stepped in a call of its own, with other random numbers.
    params = divided(torch.bfloat16, [shape for shape in SHAPES if shape])
    plain = [torch.nn.Parameter(piece.clone()) for piece in pieces(params)]
    ours, twin = kind(params, **options), kind(plain, **options)
    for seed in range(3):
        give_divided_gradients(params, seed)
        for param, piece in zip(params, plain, strict=True):
            piece.grad = param.grad.to_local().clone()
        for optimizer in (ours, twin):
            torch.manual_seed(seed)
            optimizer.step()
    assert snapshot(ours) == snapshot(twin)
    assert ours.memory_report() == twin.memory_report()
    return [piece.shape[0] for piece in pieces(params)]


@every_storage
@every_optimizer
def test_pieces_are_stepped_as_plain_tensors_are(pair, case, storage):
    rows = pair.call(beside_plain_pieces, case.ours, {**case.options, **storage})
    assert rows == [[4, 4, 1, 2], [3, 3, 0, 2]]


def skipping(rank, kind, max_grad_norm):
    params = divided(torch.float16)
    optimizer = kind(params, lr=0.01, max_grad_norm=max_grad_norm)
    give_divided_gradients(params, 0)
    optimizer.step()
    for which in range(len(params)):
        before = snapshot(optimizer)
        give_divided_gradients(params, 1, (which, BAD[which % len(BAD)]))
        optimizer.step()
        assert optimizer.last_found_inf.item() == 1
        assert snapshot(optimizer) == before
    give_divided_gradients(params, 2)
    optimizer.step()
    assert optimizer.last_found_inf.item() == 0
    assert snapshot(optimizer) != before


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@every_optimizer
def test_a_nan_in_one_piece_changes_no_bit_of_any(pair, case, max_grad_norm):
    pair.call(skipping, case.ours, max_grad_norm)


def pieces_moved(rank):
    params, twins = divided(), divided()
    optimizer, twin = AdamW(params), AdamW(twins)
    for seed in range(3):
        for each in (params, twins):
            give_divided_gradients(each, seed)
        # As FSDP does when a model was moved or loaded.
        for param in params:
            param._local_tensor = param._local_tensor.clone()
        optimizer.step()
        twin.step()
    assert snapshot(optimizer) == snapshot(twin)


def test_pieces_may_be_replaced_between_steps(pair):
    pair.call(pieces_moved)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.GELU(), torch.nn.Linear(7, 5))


def fully_sharded(mesh=None):
    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(sharded, mesh=mesh)


def trained_beside_one_process(rank, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    inputs = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 40.0]).view(2, 1, 1)
    whole, sharded = model(), fully_sharded(mesh)
    one = AdamW(whole.parameters(), lr=0.1, max_grad_norm=1.0)
    ours = AdamW(sharded.named_parameters(), lr=0.1, max_grad_norm=1.0)
    for _ in range(3):
        (sum(whole(part).square().sum() for part in inputs) / 2).backward()
        sharded(inputs[rank]).square().sum().backward()
        for optimizer in (one, ours):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.last_grad_norm, one.last_grad_norm, rtol=1e-5, atol=0)
    for param, twin in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param.full_tensor(), twin, rtol=1e-5, atol=1e-5)
    report = ours.memory_report()
    return report.elements, report.parameters + report.optimizer


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6's fully_shard does not train on a CPU, with any optimizer")
@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (2, 1)], ids=["fsdp", "hsdp-sharded", "hsdp-replicated"])
def test_fully_shard_trains_as_one_process(pair, mesh_shape):
    elements, size = zip(*pair.call(trained_beside_one_process, mesh_shape), strict=True)
    every = sum(param.numel() for param in model().parameters())
    assert sum(elements) == every * (2 if mesh_shape == (2, 1) else 1)
    assert all(12 * count <= held <= 12 * count + 4 * 4 for count, held in zip(elements, size, strict=True))


def placed_every_way(rank):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(6, 4) for _ in range(4)]
    placements = [[Shard(0)], [Shard(1)], [Replicate()], None]
    params = [
        torch.nn.Parameter(each.clone() if placed is None else distribute_tensor(each, mesh, placed))
        for each, placed in zip(whole, placements, strict=True)
    ]
    optimizer, one = (
        SGD(params, lr=0.5, max_grad_norm=1.0),
        SGD(map(torch.nn.Parameter, whole), lr=0.5, max_grad_norm=1.0),
    )
    for param, twin in zip(params, members(one), strict=True):
        twin.grad = torch.randn(6, 4)
        # Placed otherwise than the parameter.
        param.grad = distribute_tensor(twin.grad, mesh, [Shard(0)]) if isinstance(param, DTensor) else twin.grad.clone()
    optimizer.step()
    one.step()
    torch.testing.assert_close(optimizer.last_grad_norm, one.last_grad_norm, rtol=1e-6, atol=0)
    for param, twin in zip(params, members(one), strict=True):
        found = param.full_tensor() if isinstance(param, DTensor) else param
        torch.testing.assert_close(found, twin, rtol=1e-6, atol=1e-6)


def test_every_placement_counts_once(pair):
    pair.call(placed_every_way)


def resumed_through_files(rank, kind, options, flat, folder):
    def take_steps(optimizer, seeds):
        for seed in seeds:
            give_divided_gradients(members(optimizer), seed)
            optimizer.step()

    first, second = fully_sharded().bfloat16(), fully_sharded().bfloat16()
    trained, resumed = (kind(each.parameters(), **options) for each in (first, second))
    take_steps(trained, range(2))
    take_steps(resumed, range(7, 8))
    given = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = {"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, trained, options=given)}
    checkpoint.save(saved, checkpoint_id=folder)
    loaded = {"model": second.state_dict(), "optimizer": get_optimizer_state_dict(second, resumed, options=given)}
    checkpoint.load(loaded, checkpoint_id=folder)
    second.load_state_dict(loaded["model"])
    set_optimizer_state_dict(second, resumed, loaded["optimizer"], options=given)
    for optimizer in (trained, resumed):
        take_steps(optimizer, range(2, 4))
    assert snapshot(resumed) == snapshot(trained)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@every_storage
def test_a_checkpoint_of_pieces_goes_on_bit_for_bit(pair, storage, flat, tmp_path):
    if flat and TORCH < (2, 8) and storage.get("state_dtype") == torch.int8:
        pytest.skip("this torch's flattened state dictionaries want to load all that an optimizer keeps, as scales are")
    pair.call(resumed_through_files, AdamW, {"lr": 0.01, **storage}, flat, str(tmp_path))


def whole_state_both_ways(rank):
    sharded, whole = fully_sharded(), model()
    ours, one = (AdamW(each.parameters(), lr=0.1) for each in (sharded, whole))
    torch.manual_seed(0)
    give_gradients(members(one))
    for param, twin in zip(members(ours), members(one), strict=True):
        param.grad = distribute_tensor(twin.grad, param.device_mesh, param.placements)
    ours.step()
    one.step()
    complete = StateDictOptions(full_state_dict=True)
    found = get_optimizer_state_dict(sharded, ours, options=complete)["state"]
    expected = get_optimizer_state_dict(whole, one)["state"]
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(found[name][key], value), (name, key)
    ours.zero_grad()
    fresh = AdamW(sharded.parameters(), lr=0.1)
    set_optimizer_state_dict(sharded, fresh, copy.deepcopy(get_optimizer_state_dict(whole, one)), options=complete)
    assert fresh.state_dict()["state"].keys() == one.state_dict()["state"].keys()
    for position, state in one.state_dict()["state"].items():
        assert torch.equal(fresh.state_dict()["state"][position]["exp_avg"].full_tensor(), state["exp_avg"])


def test_a_whole_state_dictionary_is_divided_and_gathered(pair):
    pair.call(whole_state_both_ways)


def placed_otherwise(rank, storage):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = torch.randn(6, 4).bfloat16()
    rows, columns = (torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)])) for dim in (0, 1))
    first, second = AdamW([rows], **storage), AdamW([columns], **storage)
    give_divided_gradients([rows], 0)
    first.step()
    columns.data.copy_(rows.detach())
    second.load_state_dict(first.state_dict())
    saved, loaded = first.state_dict()["state"][0], second.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert loaded[name].placements == columns.placements
        assert torch.equal(loaded[name].full_tensor(), saved[name].full_tensor())


@pytest.mark.parametrize("storage", [{}, {"master_weights": "split"}], ids=["fp32", "split"])
def test_loaded_state_is_placed_as_its_parameter(pair, storage):
    pair.call(placed_otherwise, storage)


def swapped(rank):
    sharded = fully_sharded()
    theirs = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    expected = copy.deepcopy(theirs)
    for optimizer in (theirs, expected):
        give_divided_gradients(members(optimizer), 0)
        optimizer.step()
    ours = swap(theirs)
    for optimizer in (ours, expected):
        give_divided_gradients(members(optimizer), 1)
        optimizer.step()
    for param, twin in zip(members(ours), members(expected), strict=True):
        torch.testing.assert_close(param.full_tensor(), twin.full_tensor(), rtol=1e-6, atol=1e-6)


def test_swap_takes_the_state_of_dtensors(pair):
    pair.call(swapped)


def scaled(rank, kind, ways):
    # Replicated ones first, on which the processes need not agree.
    params = divided(shapes=[(), *SHAPES[:-2]])
    names = [f"part {position}" for position in range(len(params))]
    clipping = {"max_grad_norm": 2.0} if "clips" in ways else {}
    optimizer = kind([{"params": list(zip(names, params, strict=True))}], lr=1.0, **clipping)
    scaler = LossScaler(16.0, device="cpu")
    scales = []
    for overflows in (False, True, False):
        scaler.scale(torch.ones(()))
        # The last row of seven is the second process's.
        give_divided_gradients(params, 0, (2, torch.inf) if overflows else None)
        if "unscales" in ways:
            scaler.unscale_(optimizer)
        before = [piece.clone() for piece in pieces(params)]
        scaler.step(optimizer)
        same = [torch.equal(new, old) for new, old in zip(pieces(params), before, strict=True) if new.numel()]
        assert same == [overflows] * len(same)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, scaler.overflow_report()


@pytest.mark.parametrize("ways", ["", "clips", "unscales", "unscales clips"])
def test_a_loss_scaler_backs_off_on_every_process(pair, ways):
    first, second = pair.call(scaled, SGD, ways)
    assert first == ([16.0, 8.0, 8.0], [])
    assert second == ([16.0, 8.0, 8.0], [("part 2", 1)])


@pytest.mark.parametrize("ways", ["", "unscales"])
def test_a_loss_scaler_steps_torch_s_optimizers_of_dtensors(pair, ways):
    first, second = pair.call(scaled, torch.optim.SGD, ways)
    assert first == ([16.0, 8.0, 8.0], [])
    assert second == ([16.0, 8.0, 8.0], [("part 2", 1)])


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = divided()
    with pytest.raises(ValueError, match="sharded_over is given and parameters of group 0 are DTensors"):
        AdamW(params, sharded_over=dist.group.WORLD)
    optimizer = AdamW(params)
    with pytest.raises(ValueError, match="sharded_over is given and parameters are DTensors"):
        optimizer.sharded_over = dist.group.WORLD
    with pytest.raises(ValueError, match="parameters are DTensors, for whose sums"):
        release_gradients(optimizer)
    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is a DTensor placed .*a sum of pieces"):
        AdamW([partial])
    give_divided_gradients(params, 0)
    optimizer.step()
    whole = AdamW([torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES])
    give_gradients(members(whole))
    whole.step()
    for target, source in ((optimizer, whole), (whole, optimizer)):
        before = snapshot(target)
        with pytest.raises(ValueError, match=r"the loaded exp_avg of parameter 0 is a .*set_optimizer_state_dict"):
            target.load_state_dict(source.state_dict())
        assert snapshot(target) == before


def precision_refused(rank):
    sharded = fully_sharded().bfloat16()
    optimizer = AdamW(sharded.parameters())
    for choose in (
        lambda: PrecisionPolicy({"*": "fp16"}).apply(sharded, optimizer),
        lambda: PrecisionController(sharded, optimizer),
    ):
        with pytest.raises(TypeError, match=r"parameter '0\.weight' of model is a DTensor"):
            choose()


def test_precisions_are_to_be_chosen_before_sharding(pair):
    pair.call(precision_refused)


def test_what_does_not_fit_is_refused_and_changes_nothing(pair):
    pair.call(refused)
