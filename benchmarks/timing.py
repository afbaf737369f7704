"""Interleaved timing: every provider of a case takes its turn in every round, in one process, with its data cold."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Longer than the clock's and the scheduler's grain; shorter calls are repeated, up to so many times, for one sample.
SAMPLE_SECONDS = 0.005
MOST_REPEATS = 5
# Written between calls, so that no call finds its data in a cache: larger than the last level of either device.
FLUSH_BYTES = {"cpu": 2**26, "cuda": 2**28}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns of every provider of a case.
        seconds: after so long a case takes no more rounds, once it has the fewest.
        fewest_rounds: how many a case takes at least.
        compiles: whether ``torch.compile`` takes part, at some seconds a case.
        memory: whether memory is measured on a CPU, at some seconds a provider.
        long: whether the cases that take longest take part.
    """

    rounds: int
    seconds: float
    fewest_rounds: int = 5
    compiles: bool = True
    memory: bool = True
    long: bool = True


FULL = Effort(rounds=31, seconds=3.0)
QUICK = Effort(rounds=7, seconds=0.5, fewest_rounds=3, compiles=False, memory=False, long=False)


def interleaved(calls: dict[str, Call], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds a call of every round, by name; on a GPU the device's seconds."""
    return take_turns({name: sampler(call, device) for name, call in calls.items()}, effort)[0]


def take_turns(
    samplers: dict[str, Callable[[], float]], effort: Effort, tolerated: tuple[type[Exception], ...] = ()
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """One sample of each in every round.

    Returns:
        The samples by name, and by name the exception of one that raised a ``tolerated`` one, which ends its part.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    failures: dict[str, Exception] = {}
    started = time.perf_counter()
    for turn in range(effort.rounds):
        if not samples or (turn >= effort.fewest_rounds and time.perf_counter() - started > effort.seconds):
            break
        # Another one goes first every round, so that no provider always follows the same neighbour.
        names = list(samples)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                samples[name].append(samplers[name]())
            except tolerated as failure:
                failures[name] = failure
                del samples[name]
    return samples, failures


def sampler(call: Call, device: torch.device, rehearsal: Call | None = None) -> Callable[[], float]:
    """Takes one sample: the mean seconds of as many calls as fill the clock's grain.

    ``rehearsal`` is the same work on other data. On a CPU it goes first, untimed, after the caches were flushed: as
    between the layers of a model, the call then finds its code in the caches and its data not.
    """
    clock = _gpu_clock(call, device) if device.type == "cuda" else _cpu_clock(call, rehearsal)
    call()
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    repeats = round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7))
    repeats = max(1, min(MOST_REPEATS, repeats))
    return lambda: statistics.fmean(clock() for _ in range(repeats))


def host_seconds(call: Call, device: torch.device, rounds: int) -> float:
    """Median seconds until ``call`` returns, with nothing queued before it: what the step costs the Python program."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(numerators: list[float], denominators: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio within each round: what slows both sides of a round alike leaves it as it is."""
    return quartiles([above / below for above, below in zip(numerators, denominators, strict=True)])


def wait(device: torch.device) -> None:
    """Wait for a GPU to finish; an error on it since the last time is raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_clock(call: Call, rehearsal: Call | None = None) -> Callable[[], float]:
    flush = _flush_buffer(torch.device("cpu"))

    def clock() -> float:
        flush.add_(1)
        if rehearsal is not None:
            rehearsal()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return clock


def _gpu_clock(call: Call, device: torch.device) -> Callable[[], float]:
    """Device time between two events. The device first waits on itself for longer than the host needs to queue the
    call, so the time between two launches does not count as the device's."""
    flush = _flush_buffer(device)
    call()
    cycles = int(2 * host_seconds(call, device, 3) * _sleep_rate(device))

    def clock() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        flush.add_(1)
        _sleep(cycles, device)
        start.record(stream)
        call()
        stop.record(stream)
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return clock


def _sleep(cycles: int, device: torch.device) -> None:
    """Keep ``device``, which may not be the current one, waiting for so many cycles."""
    with torch.cuda.device(device):
        torch.cuda._sleep(cycles)


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)


@functools.cache
def _sleep_rate(device: torch.device, cycles: int = 10**6) -> float:
    """Cycles a second of ``torch.cuda._sleep``, whose clock differs between devices."""
    seconds = []
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        _sleep(cycles, device)
        stop.record(torch.cuda.current_stream(device))
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return cycles / statistics.median(seconds)
