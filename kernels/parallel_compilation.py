"""Compile many variants at once, in processes that run without Triton's interpreter, whatever this process does."""

import functools
import importlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from .architecture import ARCHITECTURES

if TYPE_CHECKING:
    from .compilation import CompiledVariant

PROCESSES = 2


class Job(NamedTuple):
    """A variant to compile: the module whose ``variants`` has it, its name, and the architecture's name."""

    module: str
    variant: str
    architecture: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the compiled variant, or else why there is none."""

    job: Job
    compiled: "CompiledVariant | None" = None
    failure: str | None = None


def jobs_of(module: str, architecture: str) -> list[Job]:
    """A job for every variant of ``module``, an importable name, in the order of its ``variants``."""
    return [Job(module, name, architecture) for name in _variants(module, architecture)]


def compile_all(jobs: Sequence[Job], processes: int = PROCESSES) -> Iterator[Outcome]:
    """Compile ``jobs`` and yield each outcome as it is there, in no set order.

    A variant that does not compile is an outcome, and so is one whose compiler crashes. A crash ends every process of
    the pool, so each job that was under way is tried again in a process of its own.
    """
    queue, suspects = deque(jobs), []
    while queue:
        with _pool(processes) as pool:
            running: dict[Future, Job] = {}
            sound = True
            while running or (queue and sound):
                while queue and sound and len(running) < processes:
                    job = queue.popleft()
                    running[pool.submit(_compile, job)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(job)
                        sound = False
                    else:
                        yield future.result()
    for job in suspects:
        with _pool(1) as pool:
            future = pool.submit(_compile, job)
            crashed = isinstance(future.exception(), BrokenProcessPool)
            yield Outcome(job, failure="the compiler crashed") if crashed else future.result()


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork would inherit jit functions that the interpreter has taken over.
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_interpreter)


def _leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(job: Job) -> Outcome:
    import triton

    from .compilation import compile_variant

    variant = _variants(job.module, job.architecture)[job.variant]
    try:
        return Outcome(job, compile_variant(variant, ARCHITECTURES[job.architecture]))
    except (triton.TritonError, RuntimeError, ValueError) as error:
        return Outcome(job, failure=f"{type(error).__name__}: {error}")


@functools.cache
def _variants(module: str, architecture: str) -> dict:
    variants = importlib.import_module(module).variants(ARCHITECTURES[architecture])
    return {variant.name: variant for variant in variants}
