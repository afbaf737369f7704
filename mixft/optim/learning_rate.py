"""The learning rate of a parameter group as the ops take it: a one-element tensor on the parameters' device."""

import math
from typing import Any

import torch
from torch import Tensor

from mixft.ops.capture import capturing, stream_of

from .hyperparameters import check_rate_tensor
from .scalars import at


class LearningRates:
    """A tensor for each group and stream, which is written to only when the group's rate has changed.

    Gradients that are released inside backward are stepped with on the streams of their forward passes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device, int], tuple[float, Tensor]] = {}

    def of(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The rate of ``group``, FP32 on ``device``, without waiting for it.

        Raises:
            ValueError: the rate is a tensor of several elements.
        """
        rate = group["lr"]
        if isinstance(rate, Tensor):
            check_rate_tensor(rate)
            if rate.device.type != "cpu" or device.type == "cpu":
                return at(rate, device)
            # As a number: copied at every step it would be pageable memory, which a driver may wait for and a graph
            # cannot take.
            rate = rate.item()
        if capturing(device):
            # The graph's own: what it writes at every replay is not for the steps that are taken outside of it.
            return torch.full((), rate, dtype=torch.float32, device=device)
        key = (id(group), device, stream_of(device))
        value, tensor = self._kept.get(key, (math.nan, None))
        if tensor is None:
            tensor = torch.full((), rate, dtype=torch.float32, device=device)
        elif value != rate:
            tensor.fill_(rate)
        self._kept[key] = (rate, tensor)
        return tensor
