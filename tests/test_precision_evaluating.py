"""PrecisionPolicy.evaluating: 16-bit training, FP32 evaluation."""

import pytest
import torch
from optimizer_cases import bits
from precision_runs import BF16, F16, F32, TOKENS, Net, cpu_routines, train  # noqa: F401
from torch import nn

import mixft
from mixft.optim import AdamW


def trained(dtype=F16, **options):
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-2, **options)
    policy = mixft.PrecisionPolicy({"*": dtype})
    policy.apply(model, optimizer)
    train(model, optimizer)
    return policy, model, optimizer


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_runs_in_fp32_from_the_masters_and_restores_every_bit(dtype):
    policy, model, optimizer = trained(dtype)
    before = [(id(param), param.data_ptr(), bits(param)) for param in model.parameters()]
    masters = [bits(optimizer.state[param]["master"]) for param in model.parameters()]
    low = model(TOKENS)
    with policy.evaluating(model, optimizer) as evaluated:
        assert evaluated is model
        assert {param.dtype for param in model.parameters()} == {F32}
        assert [bits(param) for param in model.parameters()] == masters
        pointers = [optimizer.state[param]["master"].data_ptr() for param in model.parameters()]
        assert [param.data_ptr() for param in model.parameters()] == pointers
        high = model(TOKENS)
        reference = Net()
        reference.load_state_dict(model.state_dict())
        assert torch.equal(high, reference(TOKENS))
    assert [(id(param), param.data_ptr(), bits(param)) for param in model.parameters()] == before
    assert [bits(optimizer.state[param]["master"]) for param in model.parameters()] == masters
    assert low.dtype == model(TOKENS).dtype == dtype
    assert torch.equal(model(TOKENS), low)
    assert not torch.equal(high, low.float())


def test_training_after_it_is_as_without_it():
    runs = []
    for evaluate in (True, False):
        torch.manual_seed(1)
        policy, model, optimizer = trained()
        if evaluate:
            with policy.evaluating(model, optimizer):
                model(TOKENS)
        train(model, optimizer)
        runs.append([bits(param) for param in model.parameters()])
    assert runs[0] == runs[1]


def test_without_masters_it_widens_the_parameters():
    policy, model, _ = trained()
    narrow = [param.detach().float() for param in model.parameters()]
    with policy.evaluating(model):
        assert all(torch.equal(param, value) for param, value in zip(model.parameters(), narrow, strict=True))


@pytest.mark.parametrize("master", ["auto", "split", "none"])
def test_state_dictionaries_are_for_outside_of_it(master):
    policy, model, optimizer = trained(master_weights=master)
    kept = model.state_dict(), optimizer.state_dict()
    before = [bits(param) for param in model.parameters()]
    with policy.evaluating(model, optimizer):
        assert not {F16, BF16} & {value.dtype for value in model.state_dict().values()}
        with pytest.raises(RuntimeError, match="save the optimizer outside of policy"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="load state dictionaries outside of policy"):
            optimizer.load_state_dict(kept[1])
        with pytest.raises(RuntimeError, match="load state dictionaries outside of policy"):
            model.load_state_dict(kept[0])
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    assert [bits(param) for param in model.parameters()] == before


def test_restores_after_an_error_and_refuses_a_step():
    policy, model, optimizer = trained()
    before = [bits(param) for param in model.parameters()]
    with pytest.raises(RuntimeError, match="outside of policy"), policy.evaluating(model, optimizer):
        optimizer.step()
    assert [bits(param) for param in model.parameters()] == before
    assert model(TOKENS).dtype == F16
    train(model, optimizer, 1)


def test_buffers_too():
    model = nn.BatchNorm1d(3).half()
    policy = mixft.PrecisionPolicy({"*": "fp32"})
    policy.apply(model)
    with policy.evaluating(model.eval()):
        assert model.running_mean.dtype == F32
        assert model(torch.ones(2, 3)).dtype == F32
    assert model.running_mean.dtype == F16
