"""What the controller notes at every step, on the device, and reads every so many steps."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mixft.ops import grad_stats


@dataclass
class Rows:
    """Some steps on the host, one row a step.

    Attributes:
        losses: FP32 [steps].
        squares: FP32 [steps, parameters], sums of squares of the gradients as they were.
        nonfinite: int64 [steps, parameters], elements that are NaN or Inf.
    """

    losses: Tensor
    squares: Tensor
    nonfinite: Tensor


class StepRecord:
    """Room for ``interval`` steps of the gradients of ``params``."""

    def __init__(self, params: list[Tensor], interval: int) -> None:
        self.params = params
        self.filled = 0
        self._home = params[0].device
        shape = (interval, len(params))
        self._losses = torch.zeros(interval, dtype=torch.float32, device=self._home)
        self._squares = torch.zeros(shape, dtype=torch.float32, device=self._home)
        self._nonfinite = torch.zeros(shape, dtype=torch.int64, device=self._home)

    @property
    def full(self) -> bool:
        return self.filled == len(self._losses)

    @torch.no_grad()
    def add(self, loss: Tensor) -> None:
        """Note one step, without waiting for the device."""
        row = self.filled
        self._losses[row].copy_(loss.detach().reshape(()), non_blocking=True)
        self._squares[row].zero_()
        self._nonfinite[row].zero_()
        present = [place for place, param in enumerate(self.params) if param.grad is not None]
        # Neighbours on one device are read together, and their figures copied together.
        for _, run in groupby(enumerate(present), key=lambda pair: (self.params[pair[1]].device, pair[1] - pair[0])):
            places = [place for _, place in run]
            squares, nonfinite = grad_stats([self.params[place].grad for place in places])
            span = slice(places[0], places[-1] + 1)
            self._squares[row, span].copy_(squares, non_blocking=True)
            self._nonfinite[row, span].copy_(nonfinite, non_blocking=True)
        self.filled += 1

    def rows(self) -> Rows:
        """The steps noted so far; waits for the device."""
        filled = slice(self.filled)
        return Rows(*(kept[filled].to("cpu", copy=True) for kept in (self._losses, self._squares, self._nonfinite)))

    def clear(self) -> None:
        self.filled = 0

    def load(self, rows: Rows) -> None:
        """Go on from what ``rows`` gave.

        Raises:
            ValueError: it holds more steps than there is room for, or other parameters.
        """
        if len(rows.losses) >= len(self._losses) or rows.squares.shape[1:] != self._squares.shape[1:]:
            raise ValueError(
                f"the loaded state holds {len(rows.losses)} steps of {rows.squares.shape[1]} parameters; there are "
                f"{len(self.params)} parameters, and an interval of {len(self._losses)}"
            )
        self.filled = len(rows.losses)
        for kept, saved in (
            (self._losses, rows.losses),
            (self._squares, rows.squares),
            (self._nonfinite, rows.nonfinite),
        ):
            kept[: self.filled].copy_(saved)
