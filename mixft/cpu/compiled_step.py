"""The optimizer steps in one pass over memory, by the compiled routines of native/optimizer_step.h."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .optimizer_step import Step

# The codes of native/optimizer_step.h.
MASTERS = {torch.float32: 1, torch.int16: 2}
STATES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}


class StepTensors(ctypes.Structure):
    """``struct step`` of native/optimizer_step.h."""

    _fields_ = (
        ("count", c_int64),
        ("sizes", c_void_p),
        ("param_dtypes", c_void_p),
        ("grad_dtypes", c_void_p),
        ("params", c_void_p),
        ("grads", c_void_p),
        ("masters", c_void_p),
        ("steps", c_void_p),
        ("states", c_void_p * 3),
        ("scales", c_void_p * 3),
        ("masters_format", c_int32),
        ("state_format", c_int32),
        ("stochastic_rounding", c_int32),
        ("factor", c_float),
    )


def compiled_step(routine: native.Routine, step: Step, maximize: bool, *rule) -> None:
    """Call ``routine`` on the tensors and on what the rule needs besides, unless the step is skipped."""
    if step.is_skipped():
        return
    # Kept in variables until the routine has returned: a structure holds addresses only.
    lists = [step.params, step.grads, step.masters, step.steps, *_three(step.states), *_three(step.scales)]
    addresses = [native.addresses(listed) if listed else None for listed in lists]
    described = native.sizes(step.params), native.dtypes(step.params), native.dtypes(step.grads)
    tensors = StepTensors(
        len(step.params),
        *map(_address, described),
        *map(_address, addresses[:4]),
        (c_void_p * 3)(*map(_address, addresses[4:7])),
        (c_void_p * 3)(*map(_address, addresses[7:])),
        MASTERS[step.masters[0].dtype] if step.masters else 0,
        STATES[step.states[0][0].dtype] if step.states[0] else 0,
        step.stochastic_rounding,
        -step.gradient_factor() if maximize else step.gradient_factor(),
    )
    routine(ctypes.byref(tensors), *rule)


def _three(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [*lists, *[[]] * (3 - len(lists))]


def _address(array: ctypes.Array | None) -> int | None:
    return None if array is None else ctypes.addressof(array)
