"""Calls that launch every kernel, as users' calls do: the ops, every optimizer in every storage, and odd sizes."""

import functools
from collections.abc import Callable

import recorded_launches
import torch
from optimizer_cases import CASES, STORAGES, OptimizerCase, give_gradients, mixed_parameters

from mixft.amp import GradAccumulator, LossScaler, clip_grad_norm_
from mixft.cli import self_test_cases
from mixft.cli.self_test import Case

CLIPPING = {"max_grad_norm": 1.0}


def op(case: Case) -> None:
    case.actual(*case.inputs(case.dtype))


def steps(case: OptimizerCase, options: dict) -> None:
    """A step with a scaler, one with gradients unscaled and clipped before it, one without, and a checkpoint."""
    params = mixed_parameters("cpu")
    optimizer = case.ours(params, **options)
    scaler = LossScaler(device="cpu")
    for unscale in (False, True):
        scaler.scale(torch.ones(()))
        give_gradients(params)
        if unscale:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
    give_gradients(params)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def accumulated_step(case: OptimizerCase) -> None:
    """Of two micro-batches."""
    params = mixed_parameters("cpu")
    optimizer = case.ours(params, **case.options)
    scaler = LossScaler(device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    for _ in range(2):
        scaler.scale(torch.ones(()))
        give_gradients(params)
        accumulator.accumulate()
    scaler.step(optimizer)
    scaler.update()


LAUNCHES: dict[str, Callable[[], None]] = recorded_launches.PRODUCTS | recorded_launches.LAUNCHES
LAUNCHES |= {f"{case.op} {case.dtype}": functools.partial(op, case) for case in self_test_cases.CASES}
LAUNCHES |= {f"{case} of micro-batches": functools.partial(accumulated_step, case) for case in CASES}
LAUNCHES |= {
    f"{case} {options}": functools.partial(steps, case, case.options | options)
    for case in CASES
    for options in (*case.variations, *STORAGES.values(), *(storage | CLIPPING for storage in STORAGES.values()))
}
