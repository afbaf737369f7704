"""Sweep launch configurations: each candidate compiled, its output checked against FP64, then timed beside the shipped.

A sweep keeps what ships unless a candidate is faster by more than the spread of the rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from mixft.kernels.architecture import Architecture, architecture_of
from mixft.kernels.compilation import compile_variant, kernel_modules
from mixft.kernels.configuration import configuration, configurations, substitute

from .case import OURS, complaint
from .run import FAILURES, first_line
from .timing import Effort, interleaved, quartiles, ratios
from .tuning_spaces import Space

# A candidate is taken where three rounds in four show it faster by this much.
GAIN = 1.02
# Compiled of each candidate; tests/test_compile.py compiles every variant of what then ships.
VARIANTS = 3
TIMED = Effort(rounds=21, seconds=10.0)


@dataclass(frozen=True)
class Trial:
    """One configuration.

    Attributes:
        config: its fields.
        seconds: median time; None where it was discarded.
        speedup: median over rounds of the shipped configuration's time over this one's.
        speedup_low: lower quartile of that.
        discarded: why it was not timed; None where it was.
    """

    config: dict[str, int]
    seconds: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    discarded: str | None = None


@dataclass(frozen=True)
class Sweep:
    """What came of one space.

    Attributes:
        op: of the configuration.
        bucket: of the configuration.
        architecture: name of the architecture it was run on.
        case: the case that was timed.
        shipped: the configuration before.
        chosen: the fastest sound one; the shipped one where none is faster.
        speedup: of ``chosen`` over ``shipped``; None where the shipped one is not sound.
        untried: candidates that the time did not reach.
        trials: the shipped one, then the candidates.
    """

    op: str
    bucket: str
    architecture: str
    case: str
    shipped: dict[str, int]
    chosen: dict[str, int]
    speedup: float | None
    untried: int
    trials: list[Trial] = field(default_factory=list)


def ships(space: Space, device: torch.device) -> bool:
    """Whether ``device`` has a configuration of ``space``; some kernels are for a few architectures."""
    return (architecture_of(device).name, space.bucket) in configurations(space.op, type(space.candidates[0]))


def sweep(space: Space, device: torch.device, seconds: float, compiles: bool = True) -> Sweep:
    """Try the candidates of ``space`` for about ``seconds``: half for compiling and checking, half for timing.

    ``compiles``: look at the compiled code first; False under Triton's interpreter, which has none.
    """
    started = time.perf_counter()
    arch = architecture_of(device)
    shipped = configuration(space.op, type(space.candidates[0]), arch, space.bucket)
    configs = [shipped, *(config for config in space.candidates if config != shipped)]
    torch.manual_seed(0)
    inputs = space.case.inputs(device)
    exact = space.case.exact(inputs)
    discarded: dict[Any, str] = {}
    calls: dict[Any, Callable[[], object]] = {}
    untried = 0
    for config in configs:
        if config is not shipped and (shipped in discarded or time.perf_counter() - started > seconds / 2):
            untried += 1
            continue
        fault = compiled_fault(space, config, arch) if compiles else None
        if fault is None:
            call, fault = _checked(space, config, arch, inputs, exact)
        if fault is None:
            calls[config] = call
        else:
            discarded[config] = fault
    effort = Effort(TIMED.rounds, max(0.1, seconds - (time.perf_counter() - started)))
    samples = interleaved({str(number): call for number, call in enumerate(calls.values())}, device, effort)
    timed = dict(zip(calls, samples.values(), strict=True))
    trials, best, gain = [], shipped, 1.0
    for config in (*timed, *discarded):
        if config in discarded:
            trials.append(Trial(asdict(config), discarded=discarded[config]))
            continue
        low, middle, _ = ratios(timed[shipped], timed[config])
        trials.append(Trial(asdict(config), quartiles(timed[config])[1], middle, low))
        if low > GAIN and middle > gain:
            best, gain = config, middle
    return Sweep(
        op=space.op,
        bucket=space.bucket,
        architecture=arch.name,
        case=space.case.name,
        shipped=asdict(shipped),
        chosen=asdict(best),
        speedup=gain if shipped in timed else None,
        untried=untried,
        trials=trials,
    )


def compiled_fault(space: Space, config: Any, arch: Architecture) -> str | None:
    """What is wrong with the compiled code of the variants that ``config`` changes; None when nothing is."""
    module = kernel_modules()[space.module]
    before = {variant.name: variant for variant in module.variants(arch)}
    with substitute(space.op, config, arch, space.bucket):
        changed = [variant for variant in module.variants(arch) if variant != before.get(variant.name)]
    for variant in changed[:VARIANTS]:
        try:
            compiled = compile_variant(variant, arch)
        except (triton.TritonError, RuntimeError) as failure:
            return f"{variant.name} does not compile: {first_line(failure)}"
        if compiled.spilled_bytes:
            return f"{variant.name} spills {compiled.spilled_bytes} bytes a thread"
        if compiled.shared_memory > arch.shared_memory:
            return f"{variant.name} needs {compiled.shared_memory} bytes of shared memory of {arch.shared_memory}"
    return None


def _checked(
    space: Space, config: Any, arch: Architecture, inputs: Any, exact: Sequence[Tensor]
) -> tuple[Callable[[], Any] | None, str | None]:
    """The case's call with ``config`` after its first output was found right, or else what was wrong."""

    def substituted(run: Callable[[], Any]) -> Any:
        with substitute(space.op, config, arch, space.bucket):
            return run()

    try:
        call = substituted(lambda: space.case.providers[OURS](inputs))
        wrong = complaint(substituted(call.checked_result), exact, space.case.bound)
    except FAILURES as failure:
        return None, first_line(failure)
    return (lambda: substituted(call.run), None) if wrong is None else (None, wrong)
