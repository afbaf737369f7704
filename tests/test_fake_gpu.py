"""What ``mixft.optim`` and ``mixft.amp`` do on the host for a GPU that is not there: nothing that waits for it.

The parameters are torch's fake tensors on "cuda": they have no values, so whatever would read one fails. The kernels'
launchers do not run here; ``test_captured_step.py`` has those.
"""

from types import SimpleNamespace

import pytest
import torch
from optimizer_cases import RefuseSync, every_optimizer, every_storage, give_gradients, mixed_parameters, parameters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import mixft.optim
from mixft.amp import GradAccumulator, LossScaler, clip_grad, clip_grad_norm_, grad_norm, gradients
from mixft.kernels import device_cache


class Event:
    """A ``torch.cuda.Event`` of a device that never gets there."""

    def record(self, stream):
        pass

    def query(self):
        return False


def to_device(tensor, *args, device=None, **kwargs):
    if device is None and args and isinstance(args[0], torch.device):
        device, *args = args
    if device is None or device == tensor.device:
        return TO(tensor, *args, **kwargs)
    return torch.ops.aten._to_copy(tensor, device=device, **kwargs)


def pin_memory(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, pin_memory=True).copy_(tensor)


# Methods of which torch's binding asks for a driver, by what the operators under it do without one.
TO = torch.Tensor.to
METHODS = {
    "__invert__": lambda tensor: tensor.bitwise_not(),
    "copy_": lambda tensor, *args, **kwargs: torch.ops.aten.copy_(tensor, *args, **kwargs),
    "pin_memory": pin_memory,
    "to": to_device,
}


@pytest.fixture
def capture(monkeypatch):
    """A fake GPU; setting the item "on" makes its current stream one that is being captured."""
    state = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for name, method in METHODS.items():
        monkeypatch.setattr(torch.Tensor, name, method)
    # A fake tensor is to be taken for what it stands for, not for one of a subclass.
    monkeypatch.setattr(gradients, "Tensor", FakeTensor)
    monkeypatch.setattr(clip_grad, "Tensor", FakeTensor)
    # What is made without naming a device would be there too, where it cannot be pinned.
    with FakeTensorMode(), torch.device("cuda"):
        yield state


def one_step(scaler, optimizer, params, accumulator=None):
    for _ in range(1 if accumulator is None else 3):
        scaler.scale([torch.ones((), device="cuda"), (torch.ones(2, device="cuda"),)])
        give_gradients(params)
        if accumulator is not None:
            accumulator.accumulate()
    scaler.step(optimizer)
    scaler.update()


@every_storage
@every_optimizer
def test_a_step_reads_nothing(capture, case, storage):
    params = mixed_parameters("cuda")
    max_grad_norm = 1.0 if storage.get("master_weights") == "split" else None
    optimizer = case.ours(params, **case.options, **storage, max_grad_norm=max_grad_norm)
    scaler = LossScaler(device="cuda", patience=1, hysteresis=2)
    with RefuseSync():
        for lr in (0.1, 0.01, torch.full((), 0.1, device="cuda"), torch.full((1,), 0.1, device="cuda").double()):
            optimizer.param_groups[0]["lr"] = lr
            one_step(scaler, optimizer, params)
            give_gradients(params)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.last_found_inf.device == torch.device("cuda", 0)


@every_optimizer
def test_a_step_with_everything_reads_nothing_and_can_be_captured(capture, case):
    """Micro-batches, unscaling, clipping and two optimizers of one scaler; state is made before the capture only."""
    params, others = mixed_parameters("cuda"), parameters("cuda", torch.float16)
    optimizer = case.ours(params, **case.options, max_grad_norm=1.0)
    second = case.ours(others, **case.options, master_weights="split")
    scaler = LossScaler(device="cuda", patience=1, consecutive_hysteresis=True, hysteresis=2)
    accumulator = GradAccumulator(optimizer, scaler)
    with RefuseSync():
        for capture["on"] in (False, False, True, True):
            give_gradients(others)
            scaler.scale(torch.ones((), device="cuda"))
            scaler.unscale_(second)
            clip_grad_norm_(others, 1.0)
            grad_norm(others, float("inf"))
            scaler.step(second)
            one_step(scaler, optimizer, params, accumulator)
            scaler.update(torch.full((), 2.0, device="cuda"))
    for state in (*optimizer.state.values(), *second.state.values()):
        assert {value.device for value in state.values()} == {torch.device("cuda", 0)}


def test_gradients_of_other_parameters_than_before(capture):
    """Their columns in the record of overflows go to the device without waiting."""
    params = parameters("cuda", torch.float16)
    optimizer = mixft.optim.AdamW(params)
    scaler = LossScaler(device="cuda")
    with RefuseSync():
        one_step(scaler, optimizer, params)
        optimizer.zero_grad()
        one_step(scaler, optimizer, params[::2])
    with pytest.raises(DataDependentOutputException):
        scaler.overflow_report()


def test_gradients_of_a_subclass(capture, monkeypatch):
    """As DTensor's, whose elements nobody counts."""
    monkeypatch.setattr(gradients, "Tensor", torch.Tensor)
    params = parameters("cuda")
    optimizer = mixft.optim.AdamW(params)
    with RefuseSync():
        one_step(LossScaler(device="cuda"), optimizer, params)
    assert optimizer.last_found_inf.device == torch.device("cuda", 0)
    assert len(optimizer.state) == len(params)


def test_released_gradients(capture):
    params = mixed_parameters("cuda")
    optimizer = mixft.optim.AdamW(params)
    mixft.optim.release_gradients(optimizer)
    give_gradients(params)
    with RefuseSync(), torch.no_grad():
        for _ in range(2):
            for param in params:
                optimizer.step_in_backward(optimizer.param_groups[0], param)
        assert len(optimizer.state) == len(params)
        optimizer.step()
    assert optimizer.last_found_inf.device == torch.device("cuda", 0)


def test_a_rate_on_the_host_is_not_copied(capture):
    params = parameters("cuda")
    optimizer = mixft.optim.SGD(params, lr=torch.tensor(0.1, device="cpu"))
    give_gradients(params)
    with RefuseSync(reads=()):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"].device == torch.device("cpu")
    assert optimizer.last_found_inf.device == torch.device("cuda", 0)


def test_what_waits_is_seen(capture):
    value = torch.ones((), device="cuda")
    for read in (value.item, lambda: bool(value > 0), value.tolist):
        with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"), RefuseSync():
            read()
    with pytest.raises(AssertionError, match="from cuda:0 to cpu"), RefuseSync():
        value.cpu()
    with pytest.raises(AssertionError, match="from cpu to cuda:0"), RefuseSync():
        torch.ones((), device="cpu").to(value.device)
    with pytest.raises(AssertionError, match="nonzero waits"), RefuseSync():
        torch.where(torch.ones(3, device="cuda") > 0)
    many = torch.ones(3, device="cuda")
    with pytest.raises(AssertionError, match="masked_select"), RefuseSync():
        torch.masked_select(many, many > 0)


def test_what_every_replay_would_begin_anew_is_refused(capture):
    params = parameters("cuda", torch.float16)
    optimizer = mixft.optim.AdamW(params)
    give_gradients(params)
    optimizer.step()
    scaler = LossScaler(device="cuda")
    capture["on"] = True
    with pytest.raises(RuntimeError, match="this scaler has no scale yet"):
        scaler.scale(torch.ones((), device="cuda"))
    capture["on"] = False
    scaler.scale(torch.ones((), device="cuda"))
    capture["on"] = True
    with pytest.raises(RuntimeError, match="take one step like it before the capture"):
        scaler.step(optimizer)
    capture["on"] = False
    scaler.update(1.0)
    one_step(scaler, optimizer, params)
    optimizer.zero_grad()
    capture["on"] = True
    with pytest.raises(RuntimeError, match="other parameters have a gradient than at the scaler's last step"):
        one_step(scaler, optimizer, params[::2])


def test_memory_set_aside_for_tables_is_the_host_s(capture):
    assert device_cache._pinned(16).device == torch.device("cpu")
