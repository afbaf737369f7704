"""Optimizers through torch.distributed.checkpoint's state dictionaries, which name parameters as the model does."""

import copy

import pytest
import torch
from optimizer_cases import bits, every_optimizer, every_storage, give_gradients, members, snapshot, through_a_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from mixft.optim import AdamW

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.GELU(), torch.nn.Linear(7, 5)).to(device, torch.bfloat16)


def take_steps(optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        give_gradients(members(optimizer))
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@every_storage
@every_optimizer
def test_a_new_optimizer_goes_on_bit_for_bit(native_device, case, storage, flat):
    if flat and TORCH < (2, 8) and storage.get("state_dtype") == torch.int8:
        pytest.skip("this torch's flattened state dictionaries want to load all that an optimizer keeps, as scales are")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    trained, resumed = model(native_device), model(native_device)
    optimizer, other = (case.ours(each.parameters(), **case.options, **storage) for each in (trained, resumed))
    take_steps(optimizer, range(3))
    saved = through_a_file(get_optimizer_state_dict(trained, optimizer, options=options))
    resumed.load_state_dict(trained.state_dict())
    set_optimizer_state_dict(resumed, other, saved, options=options)
    for each in (optimizer, other):
        take_steps(each, range(3, 5))
    assert list(map(bits, resumed.parameters())) == list(map(bits, trained.parameters()))
    assert snapshot(other) == snapshot(optimizer)


@pytest.mark.skipif(TORCH < (2, 8), reason="this torch's flattened state dictionaries want to load masters too")
@pytest.mark.parametrize("storage", [{}, {"state_dtype": torch.int8}], ids=["fp32", "int8-state"])
def test_a_flat_state_of_torch_s_optimizer_gets_masters_of_its_own(native_device, storage):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    trained, resumed = model(native_device).float(), model(native_device)
    theirs = torch.optim.AdamW(trained.parameters())
    take_steps(theirs, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(trained, theirs, options=options))
    ours = AdamW(resumed.parameters(), **storage)
    resumed.load_state_dict(trained.state_dict())
    set_optimizer_state_dict(resumed, ours, saved, options=options)
    state = ours.state_dict()["state"]
    for position, (param, source) in enumerate(zip(members(ours), members(theirs), strict=True)):
        expected = theirs.state[source]["exp_avg"]
        rounding = 0 if not storage else 2.0**-4
        torch.testing.assert_close(state[position]["exp_avg"], expected, rtol=rounding, atol=rounding * expected.max())
        assert torch.equal(state[position]["master"], param.detach().float())
        assert state[position]["step"] == 2
