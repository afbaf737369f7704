"""What the optimizer steps on the CPU share, and their frame: everything in FP32, in batches that stay in the cache.

For where the compiled routines of ``compiled_step`` are not to be had: torch's operators and rules serve.
"""

import functools
import math
from collections.abc import Callable, Iterator
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

# Elements cast at a time: large enough to hide the calls' cost, small enough for the FP32 copies to stay in the cache.
BATCH = 1 << 17

Piece = tuple[int, int, int]
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
    for batch in _batches(params):
        counts = [steps[position] for position, _, _ in batch]
        is_wide = not is_split and weights[batch[0][0]].dtype == torch.float32
        if is_wide:
            wide = _pieces(weights, batch)
        else:
            param, remainder = _gathered(params, batch), _gathered(masters, batch)
            weight = join(param, remainder) if is_split else param.float()
            wide = _parts(weight, batch, params)
        # FP32 values of BF16 and 8-bit state, by the list's number; other state is updated where it lies.
        decoded = {
            number: _decoded(tensors, scales[number], batch)
            for number, tensors in enumerate(states)
            if tensors and tensors[0].dtype != torch.float32
        }
        moments = [
            _parts(decoded[number], batch, tensors) if number in decoded else _pieces(tensors, batch)
            for number, tensors in enumerate(states)
        ]
        update(wide, _scaled(_pieces(grads, batch), factor, scaled), moments, counts)
        rounds = step.stochastic_rounding and not is_wide
        dither = _Dither(batch, counts) if decoded or rounds else None
        for number, values in decoded.items():
            bits = dither.of(SECOND_MOMENT if number else FIRST_MOMENT)
            _store(values, states[number], scales[number], batch, bits)
        if not is_wide:
            if is_split:
                split_(weight, param, remainder)
                _scatter(remainder, masters, batch)
            else:
                param.copy_(round_stochastically(weight, param.dtype, dither.of(PARAMETER)) if rounds else weight)
            _scatter(param, params, batch)
        elif masters:
            torch._foreach_copy_(_pieces(params, batch), wide)


class _Dither:
    """The random bits of one batch, int32, laid out as :func:`_spans` says."""

    def __init__(self, batch: list[Piece], steps: list[Tensor]) -> None:
        self.spans = _spans(batch)
        parts = [_phases(start, end - begin) for (begin, end), (_, start, _) in zip(self.spans, batch, strict=True)]
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


def _spans(batch: list[Piece]) -> list[tuple[int, int]]:
    """Where each piece lies in a flat buffer in which every piece has whole groups."""
    spans, end = [], 0
    for _, start, stop in batch:
        begin, end = end, end + _whole_groups(stop - start)
        spans.append((begin, end))
    return spans


def _gathered(tensors: list[Tensor], batch: list[Piece]) -> Tensor | None:
    """One batch in a flat tensor, laid out as :func:`_spans` says: a view where it can be; None of an empty list."""
    if not tensors:
        return None
    if _is_view(batch):
        return _piece(tensors, batch[0])
    flat = torch.zeros(_spans(batch)[-1][1], dtype=tensors[batch[0][0]].dtype, device="cpu")
    torch._foreach_copy_(_parts(flat, batch, tensors), _pieces(tensors, batch))
    return flat


def _scatter(flat: Tensor, tensors: list[Tensor], batch: list[Piece]) -> None:
    """Write back what :func:`_gathered` gave."""
    if not _is_view(batch):
        torch._foreach_copy_(_pieces(tensors, batch), _parts(flat, batch, tensors))


def _is_view(batch: list[Piece]) -> bool:
    return len(batch) == 1 and (batch[0][2] - batch[0][1]) % GROUP_SIZE == 0


def _decoded(tensors: list[Tensor], scales: list[Tensor], batch: list[Piece]) -> Tensor:
    """One batch of BF16 or 8-bit state in FP32, laid out as :func:`_spans` says."""
    flat = _gathered(tensors, batch)
    return decode(flat, torch.cat(_scale_pieces(scales, batch))) if scales else flat.float()


def _store(values: Tensor, tensors: list[Tensor], scales: list[Tensor], batch: list[Piece], dither: Tensor) -> None:
    """Round one batch of FP32 state to the list's own dtype."""
    pieces = _pieces(tensors, batch)
    if scales:
        narrow, exponents = encode(values, tensors[0].dtype == torch.int8, dither)
        stored = _scale_pieces(scales, batch)
        torch._foreach_copy_(stored, list(exponents.split([scale.numel() for scale in stored])))
    else:
        narrow = round_stochastically(values, torch.bfloat16, dither)
    torch._foreach_copy_(pieces, _parts(narrow, batch, tensors))


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


def _batches(params: list[Tensor]) -> Iterator[list[Piece]]:
    """Lists of (position, start, stop) that cover every parameter: at most ``BATCH`` elements of one dtype a list."""
    batch, room = [], BATCH
    for position, param in enumerate(params):
        size = param.numel()
        if batch and param.dtype != params[batch[0][0]].dtype:
            yield batch
            batch, room = [], BATCH
        # Equal pieces of whole groups: no batch has a small rest of a large tensor for itself.
        length = _whole_groups(-(-size // -(-size // BATCH))) if size else 1
        for start in range(0, size, length):
            stop = min(start + length, size)
            if stop - start > room:
                yield batch
                batch, room = [], BATCH
            batch.append((position, start, stop))
            room -= stop - start
    if batch:
        yield batch


def _whole_groups(size: int) -> int:
    return -(-size // GROUP_SIZE) * GROUP_SIZE


def _piece(tensors: list[Tensor], piece: Piece) -> Tensor:
    """Some elements of a tensor, flat: those of one parameter share a layout, so any order of them will do."""
    position, start, stop = piece
    tensor = tensors[position]
    return tensor.as_strided((stop - start,), (1,), tensor.storage_offset() + start)


def _pieces(tensors: list[Tensor], batch: list[Piece]) -> list[Tensor]:
    """The pieces of one list, those that are whole tensors in their own shape; none of an empty list."""
    if not tensors:
        return []
    return [
        tensors[piece[0]] if piece[2] - piece[1] == tensors[piece[0]].numel() else _piece(tensors, piece)
        for piece in batch
    ]


def _scale_pieces(scales: list[Tensor], batch: list[Piece]) -> list[Tensor]:
    return [scales[position][start // GROUP_SIZE : -(-stop // GROUP_SIZE)] for position, start, stop in batch]


def _parts(flat: Tensor, batch: list[Piece], like: list[Tensor]) -> list[Tensor]:
    """Views of ``flat``, laid out as :func:`_spans` says, in the shape and strides of the pieces of ``like``."""
    return [
        flat.as_strided(piece.shape, piece.stride(), flat.storage_offset() + begin)
        for piece, (begin, _) in zip(_pieces(like, batch), _spans(batch), strict=True)
    ]
