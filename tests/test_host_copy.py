"""``HostCopy``: on which stream it is waited for, and when."""

from types import SimpleNamespace

import pytest
import torch

from mixft.ops.host_copy import HostCopy


class Event:
    """A ``torch.cuda.Event`` that is reached when it is waited for."""

    def __init__(self):
        self.stream, self.reached = None, False

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True


@pytest.fixture
def event(monkeypatch):
    """Of a copy from "cuda:1", which need not be the current device."""
    event = Event()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return event


def test_a_copy_from_a_gpu_is_waited_for_on_the_stream_that_makes_it(event, monkeypatch):
    made = []

    def empty(shape, *, dtype, device, pin_memory):
        made.append((shape, dtype, device, pin_memory))
        return SimpleNamespace(copy_=lambda values, non_blocking: SimpleNamespace(tolist=lambda: [non_blocking]))

    monkeypatch.setattr(torch, "empty", empty)
    copy = HostCopy(SimpleNamespace(is_cuda=True, shape=(1,), dtype=torch.float32, device="cuda:1"))
    assert made == [((1,), torch.float32, "cpu", True)]
    assert event.stream == "the stream of cuda:1"
    assert not copy.has_arrived()
    assert copy.tolist() == [True]
    assert copy.has_arrived()


def test_on_a_cpu_it_is_there_at_once(event):
    copy = HostCopy(torch.tensor([1.0, 2.0]))
    assert copy.has_arrived()
    assert copy.tolist() == [1.0, 2.0]
    assert event.stream is None
