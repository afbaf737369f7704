"""How the loss scale follows the overflows, on the device: growth, backoff, hysteresis, floor and ceiling."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

COUNTERS = ("iteration", "overflow_steps", "hysteresis_left", "floor_steps")


@dataclass
class Counters:
    """What a scaler counts, as 0-d int64 tensors where the scale is; as Python's numbers before there is one.

    Attributes:
        initial: the values that the tensors begin with.
        tensors: by name; None until ``place``. ``iteration`` begins at 1; ``overflow_steps`` are the steps skipped;
            ``hysteresis_left`` overflows go by before the scale backs off; ``floor_steps`` is the number of iterations
            at the least scale since a gradient overflowed there.
    """

    initial: dict[str, int]
    tensors: dict[str, Tensor] | None = None

    @classmethod
    def fresh(cls, hysteresis: int) -> "Counters":
        return cls(dict.fromkeys(COUNTERS, 0) | {"iteration": 1, "hysteresis_left": hysteresis})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def place(self, device: torch.device) -> None:
        self.tensors = {
            name: torch.full((), value, dtype=torch.int64, device=device) for name, value in self.initial.items()
        }

    def values(self) -> dict[str, int]:
        """The counts as numbers; waits for the device."""
        if self.tensors is None:
            return dict(self.initial)
        return {name: int(counter) for name, counter in self.tensors.items()}

    def load(self, values: dict[str, int]) -> None:
        self.initial = values
        for name, counter in (self.tensors or {}).items():
            counter.fill_(values[name])


@dataclass
class ScaleRule:
    """The options of a scaler that ``GradScaler`` lacks.

    Attributes:
        min_scale: the least scale.
        max_scale: the greatest.
        hysteresis: which overflow is the first to back off.
        consecutive_hysteresis: whether only overflows in a row count towards it.
    """

    min_scale: float
    max_scale: float
    hysteresis: int
    consecutive_hysteresis: bool

    def adapt(
        self,
        scale: Tensor,
        growth_tracker: Tensor,
        counters: Counters,
        found_inf: Tensor,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: int,
    ) -> None:
        """Move ``scale``, its tracker of finite steps and the counters by one iteration, without waiting for them."""
        overflowed = found_inf > 0
        before = scale.clone() if self.hysteresis > 1 else None
        torch._amp_update_scale_(scale, growth_tracker, found_inf, growth_factor, backoff_factor, growth_interval)
        if before is not None:
            left = counters["hysteresis_left"]
            left.sub_(overflowed.long()).clamp_(min=0)
            scale.copy_(torch.where(overflowed & (left > 0), before, scale))
            # The tracker of finite steps is at zero after one only where the scale has just grown.
            restored = ~overflowed if self.consecutive_hysteresis else ~overflowed & (growth_tracker == 0)
            left.masked_fill_(restored, self.hysteresis)
        self.confine(scale)
        at_floor = counters["floor_steps"]
        # Counted from an overflow on: a scale that merely starts at its floor needs no cure.
        counts = (scale <= self.min_scale) & (overflowed | (at_floor > 0))
        at_floor.add_(1).mul_(counts)

    def confine(self, scale: Tensor) -> None:
        """Bring ``scale`` within the bounds, in place."""
        scale.clamp_(self.min_scale, self.max_scale)


def check_scales(least: float, initial: float, greatest: float) -> None:
    """Raise TypeError for a scale that is no number, ValueError for scales that are not in this order."""
    if _is_device(initial):  # GradScaler's first argument
        raise TypeError(f"init_scale is {initial!r}; the device is a keyword here: device={str(initial)!r}")
    for name, scale in (("min_scale", least), ("init_scale", initial), ("max_scale", greatest)):
        _check_number(name, scale)
    if not 0 < least <= initial <= greatest < float("inf"):
        raise ValueError(
            "0 < min_scale <= init_scale <= max_scale must hold with a finite max_scale; they are "
            f"{least}, {initial} and {greatest}"
        )


def _is_device(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, torch.device)
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


def check_growth_factor(factor: float) -> None:
    _check_number("growth_factor", factor)
    if not factor > 1:
        raise ValueError(f"growth_factor must be above 1; it is {factor}")


def check_backoff_factor(factor: float) -> None:
    _check_number("backoff_factor", factor)
    if not 0 < factor < 1:
        raise ValueError(f"backoff_factor must be between 0 and 1; it is {factor}")


def check_count(name: str, count: int) -> None:
    _check_number(name, count)
    if count < 1:
        raise ValueError(f"{name} must be at least 1; it is {count}")


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
