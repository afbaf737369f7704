"""Where an optimizer's memory goes: bytes of the parameters, of each kind of state, and of the gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dtensor import piece_of
from .storage import SCALE, Storage


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that this process holds when the report is made; state is made at a parameter's first step.

    Attributes:
        elements: number of elements of all parameters.
        parameters: the parameters.
        masters: FP32 masters.
        remainders: 16-bit remainders of split masters.
        state: each state tensor of the rule by name, without its scales.
        scales: scales of all 8-bit state.
        steps: step counts.
        gradients: the gradients that there are.
        without_state: number of elements of the parameters whose first step, which makes their state, is to come.
    """

    elements: int
    parameters: int
    masters: int
    remainders: int
    state: dict[str, int]
    scales: int
    steps: int
    gradients: int
    without_state: int

    @property
    def optimizer(self) -> int:
        """All that the optimizer adds to the parameters, gradients apart."""
        return self.masters + self.remainders + sum(self.state.values()) + self.scales + self.steps

    @property
    def bytes_per_parameter(self) -> float:
        """Of the parameters and all that the optimizer adds, gradients apart; 0.0 without parameters."""
        return (self.parameters + self.optimizer) / self.elements if self.elements else 0.0

    def __str__(self) -> str:
        rows = {
            "parameters": self.parameters,
            "masters": self.masters,
            "remainders": self.remainders,
            **self.state,
            "scales": self.scales,
            "steps": self.steps,
        }
        width = max(map(len, (*rows, "all but gradients")))
        total = self.parameters + self.optimizer
        lines = [self._line(name, size, width) for name, size in rows.items() if size]
        lines.append(self._line("all but gradients", total, width))
        lines.append(self._line("gradients", self.gradients, width))
        if self.without_state:
            lines.append(f"  {self.without_state:,} parameters have no state yet; their first step makes it")
        return "\n".join([f"{self.elements:,} parameters", *lines])

    def _line(self, name: str, size: int, width: int) -> str:
        each = size / self.elements if self.elements else 0.0
        return f"  {name:<{width}} {size / 2**20:>12,.2f} MiB {each:>8.3f} bytes a parameter"


def measure(params: list[Tensor], state: dict[Tensor, dict[str, Any]], storage: Storage) -> MemoryReport:
    """The report on ``params`` and their ``state``."""

    pieces = list(map(piece_of, params))

    def of(name: str) -> list[Tensor]:
        return [state[param][name] for param in params if name in state.get(param, ())]

    def held(name: str) -> int:
        return sum(tensor.nbytes for tensor in of(name))

    return MemoryReport(
        elements=sum(piece.numel() for piece in pieces),
        parameters=sum(piece.nbytes for piece in pieces),
        masters=sum(master.nbytes for master in of("master") if master.dtype == torch.float32),
        remainders=sum(master.nbytes for master in of("master") if master.dtype == torch.int16),
        state={name: size for name in storage.signed if (size := held(name))},
        scales=sum(held(name + SCALE) for name in storage.signed),
        steps=held("step"),
        gradients=sum(piece_of(param.grad).nbytes for param in params if param.grad is not None),
        without_state=sum(piece.numel() for param, piece in zip(params, pieces, strict=True) if not state.get(param)),
    )
