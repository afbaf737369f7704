"""Run one case: check every provider, then time those that passed, interleaved."""

from dataclasses import dataclass

import torch

from .case import Case, complaint
from .timing import Machine, interleaved_medians

OURS = "mixft"


@dataclass(frozen=True)
class Result:
    """One provider of one case.

    Attributes:
        case: the case's name.
        provider: the provider's name.
        seconds: median time of a call; None when its output is wrong.
        speedup: this provider's time over mixft's, so above 1 where mixft is faster; None without both times.
        floor_fraction: the least time that this machine needs over the time taken.
        complaint: what is wrong with the output; None when nothing is.
    """

    case: str
    provider: str
    seconds: float | None
    speedup: float | None
    floor_fraction: float | None
    complaint: str | None


def run_case(case: Case, device: torch.device, rounds: int, machine: Machine) -> list[Result]:
    """Check and time every provider of ``case``; one whose output is wrong gets no time."""
    torch.manual_seed(0)
    workload = case.build(device)
    complaints = {name: complaint(call(), workload, name) for name, call in workload.providers.items()}
    sound = {name: call for name, call in workload.providers.items() if complaints[name] is None}
    seconds = interleaved_medians(sound, device, rounds) if sound else {}
    floor = machine.floor_seconds(workload.bytes, workload.operations)
    return [
        Result(
            case.name,
            name,
            seconds.get(name),
            seconds[name] / seconds[OURS] if name in seconds and OURS in seconds else None,
            floor / seconds[name] if name in seconds else None,
            complaints[name],
        )
        for name in workload.providers
    ]
