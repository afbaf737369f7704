"""The optimizer steps on torch's operators: what they share is here, everything in FP32, a batch of elements at a time.

They serve where there are no compiled routines; ``compiled_step`` calls those.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .optimizer_state import (
    FIRST_MOMENT,
    GROUP_SIZE,
    PARAMETER,
    SECOND_MOMENT,
    decode,
    encode,
    join,
    phases,
    round_stochastically,
    split_,
)
from .step_batches import BATCH, Batch, batches

# What a rule does with FP32 weights, gradients, state lists and step counts, in place.
Update = Callable[[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]], None]


class Step(NamedTuple):
    """One step of some tensors, whatever the rule; empty lists mean "none".

    Attributes:
        states: first moments, second moments and AMSGrad's maxima, as many as the rule has.
        scales: the scales of each.
    """

    params: list[Tensor]
    grads: list[Tensor]
    masters: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]
    steps: list[Tensor]
    inv_scale: Tensor | None
    clip_coef: Tensor | None
    found_inf: Tensor | None
    stochastic_rounding: bool

    def is_skipped(self) -> bool:
        return self.found_inf is not None and bool(self.found_inf.item())

    def gradient_factor(self) -> float:
        """What the gradients are multiplied by."""
        return math.prod([scalar.item() for scalar in (self.inv_scale, self.clip_coef) if scalar is not None])


def optimizer_step_(step: Step, update: Update) -> None:
    """Advance the step counts and apply ``update``, unless the step is skipped."""
    if step.is_skipped():
        return
    params, grads, masters, steps = step.params, step.grads, step.masters, step.steps
    states, scales = step.states, step.scales
    factor = step.gradient_factor()
    _advance(steps)
    weights = masters or params
    if factor == 1.0 and all(t.dtype == torch.float32 for t in (*weights, *grads, *(t[0] for t in states if t))):
        update(weights, grads, states, steps)
        if masters:
            torch._foreach_copy_(params, masters)
        return
    scaled = torch.empty(BATCH, dtype=torch.float32, device="cpu")
    is_split = bool(masters) and masters[0].dtype == torch.int16
    for batch in batches(params):
        counts = [steps[piece.position] for piece in batch.pieces]
        is_wide = not is_split and batch.first(weights).dtype == torch.float32
        if is_wide:
            wide = batch.of(weights)
        else:
            param, remainder = batch.gather(params), batch.gather(masters)
            weight = join(param, remainder) if is_split else param.float()
            wide = batch.parts(weight, params)
        # FP32 values of BF16 and 8-bit state, by the list's number; other state is updated where it lies.
        decoded = {
            number: _decoded(tensors, scales[number], batch)
            for number, tensors in enumerate(states)
            if tensors and tensors[0].dtype != torch.float32
        }
        moments = [
            batch.parts(decoded[number], tensors) if number in decoded else batch.of(tensors)
            for number, tensors in enumerate(states)
        ]
        update(wide, _scaled(batch.of(grads), factor, scaled), moments, counts)
        rounds = step.stochastic_rounding and not is_wide
        dither = _Dither(batch, counts) if decoded or rounds else None
        for number, values in decoded.items():
            bits = dither.of(SECOND_MOMENT if number else FIRST_MOMENT)
            _store(values, states[number], scales[number], batch, bits)
        if not is_wide:
            if is_split:
                split_(weight, param, remainder)
                batch.scatter(remainder, masters)
            else:
                param.copy_(round_stochastically(weight, param.dtype, dither.of(PARAMETER)) if rounds else weight)
            batch.scatter(param, params)
        elif masters:
            torch._foreach_copy_(batch.of(params), wide)


class _Dither:
    """The random bits of one batch, int32, laid out as its flat buffer."""

    def __init__(self, batch: Batch, steps: list[Tensor]) -> None:
        self.spans = batch.spans
        parts = [
            _phases(piece.start, end - begin) for (begin, end), piece in zip(self.spans, batch.pieces, strict=True)
        ]
        self.phases = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.steps = [int(step) for step in steps]

    def of(self, increment: int) -> Tensor:
        """A new tensor, which may be written to."""
        if len(set(self.steps)) == 1:
            return self.phases + _wrapped(self.steps[0] * increment)
        bits = self.phases.clone()
        torch._foreach_add_(
            [bits[begin:end] for begin, end in self.spans], [_wrapped(step * increment) for step in self.steps]
        )
        return bits


def _phases(start: int, length: int) -> Tensor:
    # Most tensors, and all that are small, begin at element 0.
    return phases(start, start + length) if start or length > BATCH else _first_phases(BATCH)[:length]


@functools.cache
def _first_phases(length: int) -> Tensor:
    return phases(0, length)


def _wrapped(number: int) -> int:
    """``number`` as an int32 would hold it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _decoded(tensors: list[Tensor], scales: list[Tensor], batch: Batch) -> Tensor:
    """The flat buffer of one batch of BF16 or 8-bit state, in FP32."""
    flat = batch.gather(tensors)
    return decode(flat, torch.cat(batch.of_scales(scales))) if scales else flat.float()


def _store(values: Tensor, tensors: list[Tensor], scales: list[Tensor], batch: Batch, dither: Tensor) -> None:
    """Round one batch of FP32 state to the list's own dtype."""
    if scales:
        for (begin, end), piece in zip(batch.spans, batch.pieces, strict=True):
            if piece.size % GROUP_SIZE:
                # A group that held a NaN was decoded as NaN up to its end, beyond the tensor's.
                values[begin + piece.size : end].zero_()
        narrow, exponents = encode(values, tensors[0].dtype == torch.int8, dither)
        stored = batch.of_scales(scales)
        torch._foreach_copy_(stored, list(exponents.split([scale.numel() for scale in stored])))
    else:
        narrow = round_stochastically(values, torch.bfloat16, dither)
    torch._foreach_copy_(batch.of(tensors), batch.parts(narrow, tensors))


def _scaled(grads: list[Tensor], factor: float, buffer: Tensor) -> list[Tensor]:
    """FP32 gradients times ``factor``: in ``buffer``, or where they lie if they are that already."""
    if factor == 1.0 and all(grad.dtype == torch.float32 for grad in grads):
        return grads
    # Scaled on a copy, though torch's kernels could unscale: they would write the caller's gradients.
    scaled, start = [], 0
    for grad in grads:
        scaled.append(buffer.as_strided(grad.shape, grad.stride(), start))
        start += grad.numel()
    # Widened first: torch would round the product of a 16-bit tensor and a number to 16 bits.
    torch._foreach_copy_(scaled, grads)
    if factor != 1.0:
        buffer[:start].mul_(factor)
    return scaled


def _advance(steps: list[Tensor]) -> None:
    """Add one to every step, in one call where they lie side by side."""
    first = steps[0].data_ptr()
    if all(step.data_ptr() == first + 4 * position for position, step in enumerate(steps)):
        steps[0].as_strided((len(steps),), (1,)).add_(1)
    else:
        torch._foreach_add_(steps, 1)
