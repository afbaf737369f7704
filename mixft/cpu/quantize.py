"""int8 quantization on the CPU: one pass over memory by the compiled routine, or as few as torch's operators allow.

The formulas, and the meaning of the arguments, are those of ``mixft.kernels.quantize``, and the compiled routine gives
the same bits, those of stochastic rounding included; torch's operators round with random numbers of their own. Rounding
and the conversion to int8 are one addition and one narrowing copy: 1.5 * 2^23 + y is rounded at the unit, ties to even,
and the low byte of that FP32 number is round(y) as int8.
"""

import functools
import threading
from collections.abc import Iterator
from itertools import repeat
from math import inf, isfinite

import torch
from torch import Tensor

from . import native
from .compiled_quantize import SMALL, quantize_into

UNIT_ROUNDER = 12582912.0
SMALLEST_SCALE = 2.0**-126

# Elements rounded at a time: an FP32 buffer of 8 MB stays in the last-level cache.
PIECE = 1 << 21

# Elements of the buffer that each thread keeps, 16 MB.
WORKSPACE = 2 * PIECE
local = threading.local()

# Lowest bit of each of the four 16-bit lanes of an int64.
ODD_LANES = 0x0001000100010001


def quantize(
    x: Tensor, symmetric: bool, seed: Tensor | None, factor: Tensor | None = None, propagate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``x`` [outer, n, inner] along ``n``; see ``mixft.kernels.quantize.quantize``."""
    if native.available() and x.numel():
        outer, _, inner = x.shape
        values = torch.empty(x.shape, dtype=torch.int8, device="cpu")
        scale = torch.empty((outer, 1, inner), dtype=torch.float32, device="cpu")
        zero_point = no_zero_point() if symmetric else torch.empty(scale.shape, dtype=torch.int32, device="cpu")
        quantize_into(values, scale, zero_point, x, symmetric, seed, factor, propagate)
        return values, scale, zero_point
    if factor is not None:
        if x.numel() > WORKSPACE and x.shape[0] * x.shape[2] > 1 and symmetric and seed is None:
            return quantize_in_parts(x, factor, propagate)
        x = torch.mul(x, factor.view(1, -1, 1), out=workspace(x.numel()).view(x.shape))
    if propagate and x.dtype != torch.float32:
        x = x.float()
    if symmetric and seed is None and x.dtype == torch.float32 and x.numel() > 0:
        quantized = quantize_nearest(x, overwrite=factor is not None, propagate=propagate)
        if quantized is not None:
            return quantized
    return quantize_by_operators(x, symmetric, seed, propagate)


def quantize_by_operators(
    x: Tensor, symmetric: bool, seed: Tensor | None, propagate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Every case of ``quantize``, without a factor, in torch's operators."""
    outer, _, inner = x.shape
    values = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    if values.numel() == 0:
        low = high = torch.zeros((outer, 1, inner), dtype=torch.float32, device="cpu")
        finite = True
    else:
        low, high = value_range(x, symmetric)
        # NaN and infinity pass through every reduction, so the range tells of them without another look at x.
        finite = isfinite((high if symmetric else high - low).amax())
    if not (finite or propagate):
        low, high = value_range(torch.where(x.isfinite(), x, 0), symmetric)
    if symmetric:
        scale, inverse = symmetric_scale(high)
        shift = UNIT_ROUNDER
        zero_point = no_zero_point()
        lowest = -127
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high / 255 - low / 255).clamp_(min=SMALLEST_SCALE)
        inverse = scale.reciprocal()
        zero_point = (-128 - low * inverse).round_()
        shift = zero_point + UNIT_ROUNDER
        zero_point = zero_point.to(torch.int32)
        lowest = -128
    if values.numel() == 0:
        return values, scale, zero_point

    generator = None if seed is None else torch.Generator("cpu").manual_seed(int(seed))
    # A finite symmetric group cannot leave the range by rounding to the nearest, so it needs no clamp.
    clamped = not (symmetric and finite and generator is None)
    for source, target, factor, offset in pieces(x, values, inverse, shift):
        y = source * factor if source.dtype == torch.float32 else source.float().mul_(factor)
        if not finite:
            y.nan_to_num_(nan=0.0, posinf=inf, neginf=-inf)
        if generator is not None:
            y.add_(rounding_noise(y.shape, generator), alpha=2.0**-16)
        y.add_(offset)
        if clamped:
            y.clamp_(UNIT_ROUNDER + lowest, UNIT_ROUNDER + 127)
        target.copy_(y.view(torch.int32))
    return values, scale, zero_point


def quantize_in_parts(x: Tensor, factor: Tensor, propagate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric, nearest case with a factor, some groups at a time, so that each product fits the workspace."""
    dim = 0 if x.shape[0] > x.shape[2] else 2
    length = max(1, WORKSPACE * x.shape[dim] // x.numel())
    parts = [quantize(part, True, None, factor, propagate) for part in x.split(length, dim)]
    values, scales, zero_points = zip(*parts, strict=True)
    return torch.cat(values, dim), torch.cat(scales, dim), zero_points[0]


def quantize_nearest(x: Tensor, overwrite: bool, propagate: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """The symmetric, nearest, FP32 case of ``quantize`` in the fewest passes.

    None where ``x`` is not all finite, unless that is to ``propagate`` into the scales.
    """
    high = x.abs().amax(1, keepdim=True) if x.numel() <= SMALL else value_range(x, True)[1]
    if not (propagate or isfinite(high.amax().item())):
        return None
    scale, inverse = symmetric_scale(high)
    rounder = unit_rounder(x.shape[1], 1) if x.shape[2] == 1 else unit_rounder(1, x.shape[2])
    if x.numel() <= SMALL:
        y = torch.addcmul(rounder, x, inverse)
        values = y.view(torch.int32).to(torch.int8, memory_format=torch.contiguous_format)
    else:
        values = torch.empty(x.shape, dtype=torch.int8, device="cpu")
        rounder = rounder.expand(1, *x.shape[1:])
        for source, target, factor, offset in pieces(x, values, inverse, rounder):
            out = source if overwrite else workspace(source.numel()).view(source.shape)
            target.copy_(torch.addcmul(offset, source, factor, out=out).view(torch.int32))
    return values, scale, no_zero_point()


def symmetric_scale(high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and its inverse for groups of the largest magnitudes ``high``, which is changed."""
    high.clamp_(min=127 * SMALLEST_SCALE)
    # A number over a tensor would be its reciprocal times the number: two roundings.
    return high / 127, number(127.0) / high


def workspace(size: int) -> Tensor:
    """FP32 memory, this thread's own where it suffices: new pages would cost more than the pass that fills them."""
    if size > WORKSPACE:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    if not hasattr(local, "buffer"):
        # An inference tensor could not be written to in training.
        with torch.inference_mode(False):
            local.buffer = torch.empty(WORKSPACE, dtype=torch.float32, device="cpu")
    return local.buffer[:size]


@functools.cache
def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


@functools.cache
def no_zero_point() -> Tensor:
    return torch.empty(0, dtype=torch.int32, device="cpu")


@functools.lru_cache(maxsize=64)
def unit_rounder(rows: int, columns: int) -> Tensor:
    # A full row of it: torch's addcmul is several times slower when two of its operands are broadcast along a row.
    return torch.full((1, rows, columns), UNIT_ROUNDER, dtype=torch.float32, device="cpu")


def value_range(x: Tensor, symmetric: bool) -> tuple[Tensor | None, Tensor]:
    """FP32 (low, high) along dimension 1; (None, absmax) when ``symmetric``. NaN and infinity show in the result."""
    if x.dtype == torch.float32:
        # Two reductions that read only are faster than one over the absolute values, which are written first.
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (None, torch.maximum(high, low.neg_())) if symmetric else (low, high)
    if symmetric:
        # Without the sign bit 16-bit floats are ordered as their bits are, NaN on top, and integers reduce faster.
        magnitude = x.view(torch.int16) & 0x7FFF
        high = magnitude.amax(1, keepdim=True).view(x.dtype).float()
        return None, high
    return x.amin(1, keepdim=True).float(), x.amax(1, keepdim=True).float()


def pieces(x: Tensor, values: Tensor, *groups: Tensor | float) -> Iterator[tuple[Tensor, ...]]:
    """Matching parts of ``PIECE`` elements or so of x, of values and of tensors [outer, 1, inner] or numbers."""
    dim = 0 if x.shape[0] >= x.shape[1] else 1
    length = max(1, PIECE * x.shape[dim] // x.numel())
    split = [
        group.split(length, dim) if isinstance(group, Tensor) and group.shape[dim] > 1 else repeat(group)
        for group in groups
    ]
    return zip(x.split(length, dim), values.split(length, dim), *split, strict=False)


def rounding_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """FP32 odd integers, uniform in (-2^15, 2^15): four from each 64-bit random number, the dear part."""
    count = shape.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    return bits.bitwise_or_(ODD_LANES).view(torch.int16)[:count].view(shape).float()
