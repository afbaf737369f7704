"""Which raised modules go back to 16 bits, and why."""

from typing import Any

import torch

from .diagnosis import Symptom
from .memory import free_share


class Recovery:
    """Lowers what has been calm for long, and the calmest module where memory is short.

    Attributes:
        calm_steps: steps without a symptom after which a module that was raised once is lowered, twice as many for one
            that was raised twice, and so on; None for never.
        memory_reserve: the share of a device's memory below which it is short; None for never.
        times_raised: how often each module was raised.
        last_raised: the step at which each was raised last.
    """

    def __init__(self, calm_steps: int | None, memory_reserve: float | None) -> None:
        self.calm_steps = calm_steps
        self.memory_reserve = memory_reserve
        self.times_raised: dict[str, int] = {}
        self.last_raised: dict[str, int] = {}

    def note_raised(self, name: str, step: int) -> None:
        self.times_raised[name] = self.times_raised.get(name, 0) + 1
        self.last_raised[name] = step

    def too_little_free(self, device: torch.device) -> float | None:
        """The share of the device's memory that is free, where that is too little; else None."""
        free = None if self.memory_reserve is None else free_share(device)
        return free if free is not None and free < self.memory_reserve else None

    def due(self, raised: list[str], step: int, too_little_free: float | None) -> list[Symptom]:
        """What of ``raised`` is to be lowered: for calm, or with memory short one module for that."""
        calm = {name: step - self.last_raised[name] for name in raised}
        if too_little_free is not None:
            calmest = max(calm, key=calm.get, default=None)
            if calmest is None or calm[calmest] == 0:
                return []  # what was raised just now stays
            return [Symptom("memory", calmest, {"free": too_little_free})]
        if self.calm_steps is None:
            return []
        return [
            Symptom("calm", name, {"steps": steps})
            for name, steps in calm.items()
            if steps >= self.calm_steps * 2 ** (self.times_raised[name] - 1)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"times_raised": dict(self.times_raised), "last_raised": dict(self.last_raised)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.times_raised = dict(state_dict["times_raised"])
        self.last_raised = dict(state_dict["last_raised"])
