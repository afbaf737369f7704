"""The frame of the optimizer steps on the CPU: everything in FP32, in batches that stay in the cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .optimizer_state import (
    FIRST_MOMENT,
    GROUP_SIZE,
    PARAMETER,
    SECOND_MOMENT,
    as_flat,
    decode,
    encode,
    join,
    phases,
    round_stochastically,
    split_,
)

# Elements cast at a time: large enough to hide the calls' cost, small enough for the FP32 copies to stay in the cache.
BATCH = 1 << 20

Piece = tuple[int, int, int]
# What a rule does with FP32 weights, gradients, state lists and step counts, in place.
Update = Callable[[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]], None]


def optimizer_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    states: list[list[Tensor]],
    scales: list[list[Tensor]],
    steps: list[Tensor],
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    stochastic_rounding: bool,
    update: Update,
) -> None:
    """Advance the step counts and apply ``update``; ``states`` lists the first moments first, then second moments."""
    if found_inf is not None and found_inf.item():
        return
    factor = 1.0
    for scalar in (inv_scale, clip_coef):
        if scalar is not None:
            factor *= scalar.item()
    _advance(steps)
    weights = masters or params
    if factor == 1.0 and all(t.dtype == torch.float32 for t in (*weights, *grads, *(t[0] for t in states if t))):
        update(weights, grads, states, steps)
        if masters:
            torch._foreach_copy_(params, masters)
        return
    scaled = torch.empty(BATCH, dtype=torch.float32, device="cpu")
    remainders = bool(masters) and masters[0].dtype == torch.int16
    narrow = [bool(tensors) and tensors[0].dtype != torch.float32 for tensors in states]
    for batch in _batches(params):
        own, stored = _pieces(params, batch), _pieces(masters, batch)
        if remainders:
            wide = list(map(join, own, stored))
        else:
            wide = [weight.float() for weight in stored or own]
        at = [steps[position] for position, _, _ in batch]
        flat = [
            _flat_values(*both, batch) if is_narrow else None
            for *both, is_narrow in zip(states, scales, narrow, strict=True)
        ]
        moments = [
            _pieces(tensors, batch) if values is None else _parts(values, _pieces(tensors, batch))
            for tensors, values in zip(states, flat, strict=True)
        ]
        update(wide, _scaled(_pieces(grads, batch), factor, scaled), moments, at)
        dither = _Dither(batch, at) if stochastic_rounding or any(narrow) else None
        for number, values in enumerate(flat):
            if values is not None:
                bits = dither.of(SECOND_MOMENT if number else FIRST_MOMENT)
                _store_values(values, states[number], scales[number], batch, bits)
        if remainders:
            for weight, param, remainder in zip(wide, own, stored, strict=True):
                split_(weight, param, remainder)
            continue
        if stochastic_rounding:
            _round_weights(own, wide, dither.of(PARAMETER))
            continue
        for param, weight in zip(own, wide, strict=True):
            if param is not weight:
                param.copy_(weight)


class _Dither:
    """The random bits of one batch, int32, each piece beginning at a whole group of :func:`_spans`."""

    def __init__(self, batch: list[Piece], steps: list[Tensor]) -> None:
        self.spans = _spans(batch)
        self.phases = torch.zeros(self.spans[-1][1], dtype=torch.int32, device="cpu")
        for (begin, end), (_, start, _) in zip(self.spans, batch, strict=True):
            self.phases[begin:end] = phases(start, start + end - begin)
        self.steps = [int(step) for step in steps]

    def of(self, increment: int) -> Tensor:
        bits = self.phases.clone()
        torch._foreach_add_(
            [bits[begin:end] for begin, end in self.spans], [_wrapped(step * increment) for step in self.steps]
        )
        return bits


def _wrapped(number: int) -> int:
    """``number`` as an int32 would hold it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _spans(batch: list[Piece]) -> list[tuple[int, int]]:
    """Where each piece lies in a flat buffer in which every piece has whole groups."""
    spans, end = [], 0
    for _, start, stop in batch:
        begin, end = end, end + -(-(stop - start) // GROUP_SIZE) * GROUP_SIZE
        spans.append((begin, end))
    return spans


def _flat_values(tensors: list[Tensor], scales: list[Tensor], batch: list[Piece]) -> Tensor:
    """One batch of BF16 or 8-bit state in FP32, laid out as :func:`_spans` says."""
    spans = _spans(batch)
    flat = torch.zeros(spans[-1][1], dtype=tensors[0].dtype, device="cpu")
    pieces = _pieces(tensors, batch)
    torch._foreach_copy_(_parts(flat, pieces), pieces)
    if not scales:
        return flat.float()
    return decode(flat, torch.cat(_scale_pieces(scales, batch)))


def _store_values(
    values: Tensor, tensors: list[Tensor], scales: list[Tensor], batch: list[Piece], dither: Tensor
) -> None:
    pieces = _pieces(tensors, batch)
    if scales:
        narrow, exponents = encode(values, tensors[0].dtype == torch.int8, dither)
        stored = _scale_pieces(scales, batch)
        torch._foreach_copy_(stored, list(exponents.split([scale.numel() for scale in stored])))
    else:
        narrow = round_stochastically(values, torch.bfloat16, dither)
    torch._foreach_copy_(pieces, _parts(narrow, pieces))


def _round_weights(params: list[Tensor], weights: list[Tensor], dither: Tensor) -> None:
    for param, weight, bits in zip(params, weights, _parts(dither, params), strict=True):
        if param is not weight:
            param.copy_(round_stochastically(weight, param.dtype, bits))


def _scaled(grads: list[Tensor], factor: float, buffer: Tensor) -> list[Tensor]:
    """FP32 gradients times ``factor`` in ``buffer``."""
    # Scaled on a copy, though torch's kernels could unscale: they would write the caller's gradients.
    scaled, start = [], 0
    for grad in grads:
        copy = buffer[start : start + grad.numel()].as_strided(grad.shape, grad.stride())
        # Widened first: torch would round the product of a 16-bit tensor and a number to 16 bits.
        is_wide = grad.dtype == torch.float32
        scaled.append(torch.mul(grad, factor, out=copy) if is_wide else copy.copy_(grad).mul_(factor))
        start += grad.numel()
    return scaled


def _advance(steps: list[Tensor]) -> None:
    """Add one to every step, in one call where they lie side by side."""
    first = steps[0].data_ptr()
    if all(step.data_ptr() == first + 4 * position for position, step in enumerate(steps)):
        steps[0].as_strided((len(steps),), (1,)).add_(1)
    else:
        torch._foreach_add_(steps, 1)


def _batches(params: list[Tensor]) -> Iterator[list[Piece]]:
    """Lists of (position, start, stop) that cover every parameter, at most ``BATCH`` elements a list."""
    batch, room = [], BATCH
    for position, param in enumerate(params):
        size = param.numel()
        for start in range(0, size, BATCH):
            stop = min(start + BATCH, size)
            if stop - start > room:
                yield batch
                batch, room = [], BATCH
            batch.append((position, start, stop))
            room -= stop - start
    if batch:
        yield batch


def _pieces(tensors: list[Tensor], batch: list[Piece]) -> list[Tensor]:
    """The pieces of one list; none of an empty list."""
    return [
        tensors[position]
        if stop - start == tensors[position].numel()
        # The tensors of one parameter share a layout, so any order of the elements will do.
        else as_flat(tensors[position])[start:stop]
        for position, start, stop in batch
        if tensors
    ]


def _scale_pieces(scales: list[Tensor], batch: list[Piece]) -> list[Tensor]:
    return [scales[position][start // GROUP_SIZE : -(-stop // GROUP_SIZE)] for position, start, stop in batch]


def _parts(flat: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    """Views of ``flat`` in the layout of every piece, each at its beginning in :func:`_spans`."""
    parts, begin = [], 0
    for piece in pieces:
        parts.append(flat.as_strided(piece.shape, piece.stride(), begin))
        begin += -(-piece.numel() // GROUP_SIZE) * GROUP_SIZE
    return parts
