"""Run one case: check every provider, then time those that passed, interleaved."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .case import OURS, Call, Case, Missing, Provider, Refused, complaint
from .machine import Machine
from .memory import available_bytes, measure_memory
from .peers import quiet
from .recording import Row
from .timing import FLUSH_BYTES, Effort, host_seconds, quartiles, ratios, sampler, take_turns, wait

try:
    from triton import TritonError  # a kernel that does not compile; no subclass of RuntimeError
except ModuleNotFoundError:
    TritonError = RuntimeError

COMPILED = "compile"
# What other people's code raises where it does not serve a case; a bug of theirs must not end the run either.
FAILURES = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
    TritonError,
)  # fmt: skip
HOST_ROUNDS = 7


def run_case(case: Case, device: torch.device, effort: Effort, machine: Machine) -> list[Row]:
    """A row for every provider of ``case``; one that is missing, refuses or gives a wrong output has no time.

    Raises:
        RuntimeError: a provider has broken the GPU for this process.
    """
    torch.manual_seed(0)
    if reason := too_large(case, device):
        return [case_row(case, name, "refused", reason) for name in case.providers]
    torch.compiler.reset()  # cases share their functions' code, and torch compiles only so many versions of one
    try:
        inputs = case.inputs(device)
        exact = case.exact(inputs)
    except FAILURES as failure:  # a package that a model is made with is not there, or memory
        wait(device)
        return [case_row(case, name, "refused", f"no inputs: {first_line(failure)}") for name in case.providers]
    calls, excuses = {}, {}
    for name, prepare in case.providers.items():
        if name.endswith(COMPILED) and not effort.compiles:
            excuses[name] = ("refused", "takes seconds to compile: left out of quick runs")
            continue
        call, excuse = checked(prepare, inputs, exact, case.own_bounds.get(name, case.bound))
        if excuse is None:
            calls[name] = call
        else:
            excuses[name] = excuse
            # After an illegal access the GPU serves this process no more: end it here, at the case that did it.
            wait(device)
    samplers = {}
    for name, call in calls.items():
        try:
            with quiet():
                samplers[name] = sampler(call.run, device, rehearsal(case, name, device))
        except FAILURES as failure:  # memory for a second call, for one
            excuses[name] = ("refused", first_line(failure))
            wait(device)
    samples, failures = take_turns(samplers, effort, FAILURES)
    excuses |= {name: ("refused", first_line(failure)) for name, failure in failures.items()}
    if failures:
        wait(device)
    rows = []
    for name in case.providers:
        if name in excuses:
            rows.append(case_row(case, name, *excuses[name]))
            continue
        row = timed_row(case, name, samples, machine)
        if device.type == "cuda":
            row = replace(row, host_seconds=host_seconds(calls[name].run, device, HOST_ROUNDS))
        rows.append(row)
    if not case.memory or not (effort.memory or device.type == "cuda"):
        return rows
    del inputs, exact, calls, samplers, call
    return [with_memory(row, case, device) if _has_memory(row) else row for row in rows]


def rehearsal(case: Case, provider: str, device: torch.device) -> Callable[[], Any] | None:
    """A provider's work on inputs of its own, to put its code in a CPU's caches before the timed call.

    None where the data fill the caches, so that the code would not stay, and on a GPU, whose caches hold little code.
    """
    if device.type != "cpu" or case.bytes >= FLUSH_BYTES["cpu"]:
        return None
    torch.manual_seed(1)
    return case.providers[provider](case.inputs(device)).run


def too_large(case: Case, device: torch.device) -> str | None:
    """Why the case does not fit the device's memory; None where it does."""
    free = available_bytes(device)
    return f"needs {case.needs / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free" if case.needs > free else None


def with_memory(row: Row, case: Case, device: torch.device) -> Row:
    """The row with its provider's memory, or with the reason why that could not be measured."""
    try:
        return replace(row, memory=measure_memory(case, row.provider, device))
    except FAILURES as failure:
        return replace(row, reason=f"memory not measured: {first_line(failure)}")


def checked(
    prepare: Provider, inputs: Any, exact: Sequence[Tensor], bound: float
) -> tuple[Call | None, tuple[str, str] | None]:
    """A provider's call after its first result has passed the check, or the status and the reason why there is none."""
    try:
        with quiet():
            call = prepare(inputs)
            wrong = complaint(call.checked_result(), exact, bound)
    except Missing as missing:
        return None, ("missing", str(missing))
    except (Refused, *FAILURES) as failure:
        return None, ("refused", first_line(failure))
    return (call, None) if wrong is None else (None, ("wrong", wrong))


def _has_memory(row: Row) -> bool:
    # In a fresh process a compiler's own memory would count, and it would run again.
    return row.status == "timed" and not row.provider.endswith(COMPILED)


def first_line(failure: BaseException) -> str:
    """What an exception says, in one line."""
    said = next(iter(str(failure).strip().splitlines()), "")
    kind = type(failure).__name__
    return said if isinstance(failure, Refused) else f"{kind}: {said}"


def failed(rows: Sequence[Row]) -> bool:
    """Whether a provider's output failed its check."""
    return any(row.status == "wrong" for row in rows)


def timed_row(case: Case, provider: str, samples: dict[str, list[float]], machine: Machine) -> Row:
    """The row of a provider from its samples, mixft's and the machine's ceilings."""
    low, median, high = quartiles(samples[provider])
    ratio = ratios(samples[provider], samples[OURS]) if OURS in samples else (None, None, None)
    floor = machine.floor_seconds(case.bytes, case.operations, case.rate)
    return case_row(
        case,
        provider,
        "timed",
        seconds=median,
        seconds_low=low,
        seconds_high=high,
        host_seconds=median,
        speedup=ratio[1],
        speedup_low=ratio[0],
        speedup_high=ratio[2],
        floor_seconds=floor,
        floor_fraction=floor / median,
    )


def case_row(case: Case, provider: str, status: str, reason: str | None = None, **figures: float | None) -> Row:
    """A row with what is known of the case itself, and ``figures``."""
    return Row(
        case=case.name,
        family=case.family,
        provider=provider,
        status=status,
        reason=reason,
        bytes=case.bytes,
        operations=case.operations,
        rate=case.rate,
        tokens=case.tokens,
        sweep=case.sweep,
        note=case.reason_if_slower if provider == OURS else None,
        **figures,
    )
