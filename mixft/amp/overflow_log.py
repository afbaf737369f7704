"""The overflow steps of all optimizers that a scaler steps, and of those before its state was saved."""

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .overflow import Counts, OverflowRing, OverflowStep, merge


class OverflowLog:
    """A ring for each optimizer, which goes with it, after the steps that were loaded.

    A copy or a pickle of it has the steps themselves, for there the optimizers are others.
    """

    def __init__(self, loaded: Iterable[OverflowStep] = ()) -> None:
        self._loaded = list(loaded)
        self._rings: WeakKeyDictionary[torch.optim.Optimizer, OverflowRing] = WeakKeyDictionary()

    @property
    def rings(self) -> list[OverflowRing]:
        return list(self._rings.values())

    def record(
        self, optimizer: torch.optim.Optimizer, counted: Sequence[Counts], overflowed: Tensor, iteration: Tensor
    ) -> None:
        """Note one step of ``optimizer``, as :meth:`OverflowRing.record` does, on the device of ``iteration``."""
        ring = self._rings.get(optimizer)
        if ring is None:
            ring = self._rings[optimizer] = OverflowRing(optimizer, iteration.device)
        ring.record(optimizer, counted, overflowed, iteration)

    def history(self) -> list[OverflowStep]:
        """The last steps, oldest first; waits for the device."""
        return merge([*self._loaded, *(step for ring in self.rings for step in ring.read())])

    def __reduce__(self) -> tuple:
        return OverflowLog, (self.history(),)
