"""Optimizer state in fewer bits on the CPU; the formats are those of ``mixft.kernels.optimizer_state``, bit for bit."""

import math
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

# Elements of an 8-bit state tensor that share one scale.
GROUP_SIZE = 32
INFINITY_BITS = 0x7F800000
# Steps of the dither for first moments, second moments and parameters (the R3 sequence), as int32.
FIRST_MOMENT, SECOND_MOMENT, PARAMETER = (step - (1 << 32) for step in (0xD1B54A33, 0xABC98389, 0x8CB92BA7))

ARGUMENTS = (*[c_void_p] * 3, c_int64, c_int)
compiled_encode = native.Routine("encode_state", *ARGUMENTS)
compiled_decode = native.Routine("decode_state", *ARGUMENTS)
compiled_split = native.Routine("split_master", *ARGUMENTS)
compiled_join = native.Routine("join_master", *ARGUMENTS)


def encode_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of ``values``, int8 or uint8, and their uint8 scales, rounded to nearest."""
    codes = torch.empty_like(values, dtype=torch.int8 if signed else torch.uint8)
    if native.available():
        scales = torch.empty(-(-values.numel() // GROUP_SIZE), dtype=torch.uint8, device="cpu")
        _call(compiled_encode, codes, scales, values, signed)
        return codes, scales
    flat = as_flat(values)
    padded = torch.zeros(-(-flat.numel() // GROUP_SIZE) * GROUP_SIZE, dtype=torch.float32, device="cpu")
    padded[: flat.numel()] = flat
    rounded, scales = encode(padded, signed, None)
    as_flat(codes).copy_(rounded[: flat.numel()])
    return codes, scales


def decode_state(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of ``codes`` with their ``scales``."""
    values = torch.empty_like(codes, dtype=torch.float32)
    if native.available():
        _call(compiled_decode, codes, scales, values, codes.dtype == torch.int8)
        return values
    flat = as_flat(codes)
    padded = torch.zeros(scales.numel() * GROUP_SIZE, dtype=codes.dtype, device="cpu")
    padded[: flat.numel()] = flat
    as_flat(values).copy_(decode(padded, scales)[: flat.numel()])
    return values


def split_weights(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP32 ``master`` as a parameter of ``dtype`` and its int16 remainder."""
    param, remainder = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    if native.available():
        _call(compiled_split, param, remainder, master, native.DTYPES[dtype])
    else:
        split_(master, param, remainder)
    return param, remainder


def join_weights(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 weights of a 16-bit ``param`` and its int16 ``remainder``."""
    if not native.available():
        return join(param, remainder)
    master = torch.empty_like(param, dtype=torch.float32)
    _call(compiled_join, param, remainder, master, native.DTYPES[param.dtype])
    return master


def _call(routine: native.Routine, narrow: Tensor, beside: Tensor, wide: Tensor, kind: int) -> None:
    routine(*map(native.address, (narrow, beside, wide)), wide.numel(), kind)


def as_flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor that fills its storage, in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def split_(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write ``master`` to ``param`` and ``remainder``."""
    if param.dtype == torch.bfloat16:
        bits, upper = master.view(torch.int32), param.view(torch.int16)
        remainder.copy_(bits)
        upper.copy_((bits + 0x8000).bitwise_right_shift_(16))
        if may_hold_nan(master):
            is_nan = master.isnan()
            remainder.masked_fill_(is_nan, 0)
            upper.masked_fill_(is_nan, 0x7FC0)
        return
    param.copy_(master)
    distance = torch.sub(master, param.float()).div_(_remainder_unit(param))
    if may_hold_nan(distance):
        # Inf less Inf: an overflow has nothing left over.
        distance.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    remainder.copy_(distance.round_())


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 weights of ``param`` and ``remainder``."""
    if param.dtype == torch.bfloat16:
        bits = param.view(torch.int16).int().bitwise_left_shift_(16)
        joined = torch.add(bits, remainder)
        if may_hold_nan(joined.view(torch.float32)):
            # Below a zero that was written by hand, an old remainder would turn the sign bit and make a NaN: it stays.
            joined = torch.where((joined ^ bits) < 0, bits, joined)
        return joined.view(torch.float32)
    return param.float().add_(remainder.float().mul_(_remainder_unit(param)))


def may_hold_nan(values: Tensor) -> bool:
    """False where no element is a NaN, found in one pass: comparisons take several times as long."""
    return math.isnan(values.sum().item())


def _remainder_unit(param: Tensor) -> Tensor:
    """2^(e - 25) for an FP16 parameter of exponent e, at least -14."""
    exponent = (param.view(torch.int16) & 0x7C00).clamp_(min=0x400)
    return exponent.int().bitwise_left_shift_(13).add_((127 - 15 - 25) << 23).view(torch.float32)


def phases(start: int, stop: int) -> Tensor:
    """A number for each element that the dither begins with, int32: a mixing of the index's bits."""
    index = torch.arange(start, stop, dtype=torch.int64, device="cpu").int()
    index *= 0x9E3779B1 - (1 << 32)
    index ^= (index >> 15).bitwise_and_(0x1FFFF)
    return index.mul_(0x85EBCA77 - (1 << 32))


def _addend(dropped: int, dither: Tensor | None) -> Tensor | int:
    """What makes cutting off ``dropped`` bits a rounding, in the place of ``dither``; None rounds to nearest."""
    if dither is None:
        return 1 << dropped - 1
    return dither.bitwise_right_shift_(32 - dropped).bitwise_and_((1 << dropped) - 1)


def encode(values: Tensor, signed: bool, dither: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a flat tensor of whole groups; ``dither`` is used up, and None rounds to nearest.

    Comparisons, and choices between tensors, take several times as long as arithmetic here: values that need one are
    looked for among the groups' largest first.
    """
    bits = values.view(torch.int32)
    # A NaN becomes Inf, so that no sum overflows.
    rounded = (bits & 0x7FFFFFFF).clamp_(max=INFINITY_BITS)
    # The least code of an unsigned value, and its least number of eighths: 1, or 0 of a zero.
    least = None if signed else rounded.clamp(max=1)
    rounded.add_(_addend(20, dither)).bitwise_right_shift_(20)
    if not signed:
        torch.maximum(rounded, least, out=rounded)
    groups = rounded.view(-1, GROUP_SIZE)
    largest = groups.amax(1)
    if (largest >= 2040).any():
        # A finite value must not round to Inf; and a NaN has no sign.
        rounded.copy_(torch.where(values.isfinite(), rounded.clamp(max=2039), 2040))
        bits = torch.where(values.isnan(), 0, bits)
        largest = groups.amax(1)
    exponents = largest >> 3
    highest, lift = (127, 120) if signed else (255, 248)
    lifts = torch.where(largest > 0, lift - 8 * exponents, 0)
    # Where a group's largest is so small that its zeros would be lifted above zero.
    zeros = rounded == 0 if (lifts > 0).any() else None
    groups += lifts[:, None]
    if zeros is not None:
        rounded.masked_fill_(zeros, 0)
    if not signed:
        codes = torch.maximum(rounded, least, out=rounded).clamp_(max=highest).to(torch.uint8)
    else:
        codes = rounded.clamp_(min=0, max=highest).to(torch.int8)
        # Two's complement: with every bit set, this negates.
        negative = (bits >> 31).to(torch.int8)
        codes.bitwise_xor_(negative).sub_(negative)
    return codes, exponents.to(torch.uint8)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of a flat tensor of whole groups."""
    exponents = scales.int()
    eighths = codes.int().abs_()
    eighths.view(-1, GROUP_SIZE).add_((8 * exponents - (120 if codes.dtype == torch.int8 else 248))[:, None])
    values = eighths.clamp_(min=1).bitwise_left_shift_(20).view(torch.float32)
    # By 0 where the code is 0: every code has a value above zero at this point.
    values *= codes.sign()
    broken = exponents == 255
    if broken.any():
        values.view(-1, GROUP_SIZE)[broken] = math.nan
    return values


def round_stochastically(values: Tensor, dtype: torch.dtype, dither: Tensor) -> Tensor:
    """FP32 values at 16 bits, up with the probability that makes the mean right; ``dither`` is used up."""
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        # The sign is the highest bit, so this adds to the magnitude; it leaves Inf one.
        rounded = _addend(16, dither).add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
        if may_hold_nan(values):
            # A cast keeps a NaN one; cutting bits off might not.
            return torch.where(values.isnan(), values.bfloat16(), rounded)
        return rounded
    spacing = (bits & 0x7F800000).clamp_(min=(127 - 14) << 23).sub_(10 << 23).view(torch.float32)
    fraction = _addend(13, dither).float().mul_(2.0**-13)
    rounded = fraction.add_(values.abs().div_(spacing)).floor_().mul_(spacing)
    return torch.copysign(rounded, values).to(dtype)
