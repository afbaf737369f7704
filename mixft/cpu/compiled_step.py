"""The optimizer steps in one pass over memory, by the compiled routines of native/optimizer_step.h."""

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p
from itertools import chain, islice

import torch

from . import native
from .optimizer_step import Step

# The codes of native/optimizer_step.h.
MASTERS = {None: 0, torch.float32: 1, torch.int16: 2}
STATES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}

# Descriptions that are kept; one of a thousand tensors takes half a megabyte.
KEPT = 64


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
    lists = (step.params, step.masters, step.steps, *step.states, *step.scales)
    kept = _described(
        tuple(native.starts(list(chain.from_iterable(lists)))),
        tuple(map(len, lists)),
        native.sizes_of(step.params),
        native.dtypes_of(step.params),
        native.dtypes_of(step.grads),
        step.masters[0].dtype if step.masters else None,
        step.states[0][0].dtype if step.states[0] else torch.float32,
    )
    # Not among what is kept, as gradients are often new at every step. ``grads`` and ``tensors`` hold what the routine
    # reads, and so have to live until it returns.
    grads = native.addresses(step.grads)
    tensors = StepTensors.from_buffer_copy(kept)
    tensors.grads = ctypes.addressof(grads)
    tensors.stochastic_rounding = step.stochastic_rounding
    factor = step.gradient_factor()
    tensors.factor = -factor if maximize else factor
    routine(ctypes.byref(tensors), *rule)


@functools.lru_cache(KEPT)
def _described(
    addresses: tuple[int, ...],
    lengths: tuple[int, ...],
    sizes: tuple[int, ...],
    param_dtypes: tuple[torch.dtype, ...],
    grad_dtypes: tuple[torch.dtype, ...],
    masters_dtype: torch.dtype | None,
    state_dtype: torch.dtype,
) -> StepTensors:
    """All but the gradients and the step's numbers. The cache's key is every address and size in it, so that a cached
    description is never out of date.

    Args:
        addresses: of the parameters, masters, step counts, each state and the scales of each, one after the other.
        lengths: how many these are; 0 for none.
    """
    rest = iter(addresses)
    arrays = [native.pointers(list(islice(rest, length))) if length else None for length in lengths]
    params, masters, steps, *beside = map(_address, arrays)
    number = len(beside) // 2
    described = native.integers(c_int64, sizes), native.dtype_codes(param_dtypes), native.dtype_codes(grad_dtypes)
    tensors = StepTensors(
        len(sizes),
        *map(_address, described),
        params,
        None,
        masters,
        steps,
        (c_void_p * 3)(*beside[:number]),
        (c_void_p * 3)(*beside[number:]),
        MASTERS[masters_dtype],
        STATES[state_dtype],
    )
    # The structure holds addresses only.
    tensors.arrays = arrays, described
    return tensors


def _address(array: ctypes.Array | None) -> int | None:
    return None if array is None else ctypes.addressof(array)
