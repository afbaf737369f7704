"""``capturing``, which kernels have for themselves: of which device's stream it asks."""

from contextlib import contextmanager

import pytest
import torch

from mixft.kernels import device_cache
from mixft.ops import capture


@pytest.mark.parametrize("capturing", [capture.capturing, device_cache.capturing], ids=["ops", "kernels"])
@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", False), ("cuda:0", False), ("cuda:1", True), ("cpu", False), ("meta", False)]
)
def test_the_stream_is_that_of_the_device_and_not_of_the_current_one(monkeypatch, capturing, device, expected):
    """Device 0 is the current one; device 1 captures."""
    current = [0]

    @contextmanager
    def within(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert capturing(torch.device(device)) is expected
    assert current == [0]
