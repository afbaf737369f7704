"""What an optimizer keeps of its tensors from step to step: kept while it holds, and never longer."""

import pytest
import torch
from optimizer_cases import copies

from mixft.optim import AdamW, metadata


@pytest.fixture(params=["guards", "plain"])
def metadata_of(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(metadata, "GUARDS", None)
    return metadata.Metadata


@pytest.fixture(autouse=True)
def device(native_device):
    return native_device


def test_tensors_alike_are_described(metadata_of):
    first = [torch.ones(3, 4), torch.ones(2, dtype=torch.float16), torch.nn.Parameter(torch.ones(()))]
    described = metadata_of(first)
    assert described.describes(first)
    assert described.describes([torch.zeros(3, 4), first[1].clone(), torch.nn.Parameter(torch.zeros(()))])


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 3, dtype=torch.bfloat16),
        torch.ones(9),
        torch.ones(3, 3, 1),
        torch.ones(3, 4)[:, :3],
        torch.ones(3, 3).t(),
        torch.ones(3, 3, device="meta"),
        torch.ones(3, 3).to_sparse(),
        torch._neg_view(torch.ones(3, 3)),
        torch.nn.Parameter(torch.ones(3, 3)),
    ],
    ids=["dtype", "shape", "dimensions", "gaps", "transposed", "device", "layout", "negated", "type"],
)
def test_other_tensors_are_not(metadata_of, other):
    described = metadata_of([torch.ones(2), torch.ones(3, 3)])
    assert not described.describes([torch.ones(2), other])


def three_parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(6, 6)) for _ in range(3)]


def give_gradients(*lists):
    """New tensors, the same numbers in each list."""
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape)
        for param in params:
            param.grad = grad.clone()


def test_new_gradients_leave_all_as_arranged(metadata_of):
    params = three_parameters()
    optimizer = AdamW(params)
    kept = []
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
        kept.append(optimizer._arrangement)
    assert kept[0] is kept[1] is kept[2]


def transposed_where_it_lies(params, optimizer):
    address = params[1].data_ptr()
    params[1].data = params[1].data.t()
    assert params[1].data_ptr() == address


def moved(params, optimizer):
    params[1].data = params[1].data.clone()


def other_gradients(params, optimizer):
    params[0].grad = None


def gradient_in_another_order(params, optimizer):
    params[2].grad = params[2].grad.t().contiguous().t()


def state_replaced(params, optimizer):
    optimizer.state[params[1]]["exp_avg"] = torch.full((6, 6), 0.25)


def state_moved(params, optimizer):
    state = optimizer.state[params[1]]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        state[name].data = state[name].data.clone()


def state_swapped(params, optimizer):
    state = optimizer.state
    first, last = state[params[0]], state[params[2]]
    first["exp_avg"], last["exp_avg"] = last["exp_avg"], first["exp_avg"]


def state_dropped(params, optimizer):
    del optimizer.state[params[0]]


def state_given_away(params, optimizer):
    optimizer.state[torch.ones(2)] = optimizer.state.pop(params[2])


def parameters_in_another_order(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def parameter_exchanged(params, optimizer):
    new = torch.nn.Parameter(torch.ones(6, 6))
    new.grad = torch.full((6, 6), 0.5)
    optimizer.param_groups[0]["params"][1] = new


def group_added(params, optimizer):
    new = torch.nn.Parameter(torch.ones(6))
    new.grad = torch.full((6,), 0.5)
    optimizer.add_param_group({"params": [new], "lr": 0.5})


CHANGES = [
    transposed_where_it_lies,
    moved,
    other_gradients,
    gradient_in_another_order,
    state_replaced,
    state_moved,
    state_swapped,
    state_dropped,
    state_given_away,
    parameters_in_another_order,
    parameter_exchanged,
    group_added,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(metadata_of, change):
    params = three_parameters()
    others = copies(params, torch.float32)
    ours, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1, foreach=False)
    for number in range(4):
        give_gradients(params, others)
        if number == 2:
            change(params, ours)
            change(others, theirs)
        ours.step()
        theirs.step()
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        torch.testing.assert_close(group["params"], expected["params"], rtol=1e-5, atol=1e-6)
    for param, twin in zip(params, others, strict=True):
        assert torch.equal(param.isnan(), twin.isnan())
        torch.testing.assert_close(ours.state.get(param), theirs.state.get(twin), rtol=1e-5, atol=1e-6)


def test_as_many_gradients_of_other_parameters_are_seen(metadata_of):
    params = three_parameters()
    others = copies(params, torch.float32)
    ours, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1, foreach=False)
    for number in range(6):
        give_gradients(params, others)
        params[number % 3].grad = others[number % 3].grad = None
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)
