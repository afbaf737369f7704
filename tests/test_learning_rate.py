"""The rate of a group as a tensor: made once, changed in place, and not shared between streams."""

import torch

from mixft.optim.learning_rate import LearningRates

CPU = torch.device("cpu")


def test_one_tensor_follows_the_group_s_rate():
    rates, group = LearningRates(), {"lr": 0.1}
    first = rates.of(group, CPU)
    assert (first.dtype, first.item()) == (torch.float32, torch.tensor(0.1).item())
    group["lr"] = 0.2
    assert rates.of(group, CPU) is first
    assert first.item() == torch.tensor(0.2).item()


def test_a_step_on_another_stream_has_a_tensor_of_its_own(monkeypatch):
    """One that the first stream has written to may not be ready there, or be changed under it."""
    streams = iter([1, 2, 1])
    monkeypatch.setattr("mixft.optim.learning_rate.stream_of", lambda device: next(streams))
    rates, group = LearningRates(), {"lr": 0.1}
    first, other, again = (rates.of(group, CPU) for _ in range(3))
    assert first is again
    assert first is not other
