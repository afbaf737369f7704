"""Which parameters overflowed at which step: counted on the device, read on the host only when asked for."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from mixft.ops.capture import capturing

# Overflow steps that are remembered.
KEPT = 16

# Parameters, and int64 [parameters]: the NaN and Inf elements in the gradient of each.
Counts = tuple[Sequence[Tensor], Tensor]


class OverflowStep(NamedTuple):
    """One iteration in which an optimizer's step was skipped.

    Attributes:
        iteration: which one, the first being 1; ``LossScaler.update`` ends an iteration.
        parameters: (name, number of NaN and Inf elements in its gradient) of the parameters that had some.
    """

    iteration: int
    parameters: list[tuple[str, int]]


class OverflowRing:
    """The last ``KEPT`` overflow steps of one optimizer.

    A ring of rows on the device, one element a parameter. Every step writes its counts at the same row, and only a step
    that overflowed moves on to the next: so nothing has to be known on the host.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._refuse_capture(device)
        self._learn(optimizer)
        self._clear(device)

    def record(
        self, optimizer: torch.optim.Optimizer, counted: Sequence[Counts], overflowed: Tensor, iteration: Tensor
    ) -> None:
        """Note one step; nothing waits for the device.

        Args:
            counted: what was found in the gradients, on any devices.
            overflowed: 0-d bool, whether the step was skipped.
            iteration: 0-d int64, the number of the current iteration.

        Raises:
            RuntimeError: a CUDA graph is being captured and other parameters have a gradient than at the last step.
        """
        params = list(map(id, chain.from_iterable(listed for listed, _ in counted)))
        device = self._counts.device
        if params != self._params and not self._positions.keys() >= set(params):
            self._refuse_capture(device)
            known = self._params
            self._learn(optimizer)
            if self._params[: len(known)] == known:
                self._counts = torch.nn.functional.pad(self._counts, (0, len(self._params) - len(known)))
            else:
                self._clear(device)
        counts = [values.to(device, non_blocking=True) for _, values in counted]
        row = torch.cat(counts) if counts else self._counts.new_zeros(0)
        if params != self._params:
            row = self._counts.new_zeros(len(self.names)).index_add_(0, self._columns(params), row)
        self._counts.index_copy_(0, self._row, row.unsqueeze(0))
        self._iterations.index_copy_(0, self._row, iteration.unsqueeze(0))
        self._row.add_(overflowed).remainder_(KEPT + 1)

    def last(self) -> Tensor:
        """Counts of the last overflow step, int64 [parameters] on the device."""
        return self._counts.index_select(0, (self._row - 1).remainder_(KEPT + 1)).squeeze(0)

    def read(self) -> list[OverflowStep]:
        """The steps in order; waits for the device."""
        rows, iterations, unused = self._counts.tolist(), self._iterations.tolist(), self._row.item()
        steps = [
            OverflowStep(iteration, nonzero(self.names, counts))
            for row, (iteration, counts) in enumerate(zip(iterations, rows, strict=True))
            if iteration and row != unused
        ]
        return sorted(steps)

    def _clear(self, device: torch.device) -> None:
        self._counts = torch.zeros(KEPT + 1, len(self.names), dtype=torch.int64, device=device)
        self._iterations = torch.zeros(KEPT + 1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)

    def _learn(self, optimizer: torch.optim.Optimizer) -> None:
        self.names = parameter_names(optimizer)
        self._params = [id(param) for group in optimizer.param_groups for param in group["params"]]
        self._positions = {param: position for position, param in enumerate(self._params)}
        self._last_columns: tuple[list[int], Tensor] | None = None

    @staticmethod
    def _refuse_capture(device: torch.device) -> None:
        if capturing(device):
            raise RuntimeError(
                "other parameters have a gradient than at the scaler's last step, and every replay of this CUDA graph "
                "would begin the record of their overflows anew; take one step like it before the capture"
            )

    def _columns(self, params: list[int]) -> Tensor:
        if self._last_columns is None or self._last_columns[0] != params:
            self._refuse_capture(self._counts.device)
            positions = torch.tensor([self._positions[param] for param in params], dtype=torch.int64, device="cpu")
            device = self._counts.device
            on_device = positions.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else positions
            self._last_columns = (params, on_device)
        return self._last_columns[1]


def parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of an optimizer's parameters in order: those that it was given, else group, position and shape."""
    names = []
    for number, group in enumerate(optimizer.param_groups):
        listed = [
            f"group {number}, parameter {position} {tuple(param.shape)}"
            for position, param in enumerate(group["params"])
        ]
        given = group.get("param_names", listed)
        # A list of parameters that was changed by hand has not changed the names.
        names += given if len(given) == len(listed) else listed
    return names


def nonzero(names: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in zip(names, counts, strict=True) if count]


def merge(steps: Sequence[OverflowStep]) -> list[OverflowStep]:
    """The last ``KEPT`` of ``steps``, in order, those of one iteration as one."""
    by_iteration: dict[int, list[tuple[str, int]]] = {}
    for step in sorted(steps, key=lambda step: step.iteration):
        by_iteration.setdefault(step.iteration, []).extend(step.parameters)
    return [OverflowStep(*item) for item in by_iteration.items()][-KEPT:]
