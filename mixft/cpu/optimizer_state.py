"""Optimizer state in fewer bits on the CPU; the formats are those of ``mixft.kernels.optimizer_state``, bit for bit."""

import math

import torch
from torch import Tensor

GROUP_SIZE = 32
INFINITY_BITS = 0x7F800000
# Steps of the dither for first moments, second moments and parameters (the R3 sequence), as int32.
FIRST_MOMENT, SECOND_MOMENT, PARAMETER = (step - (1 << 32) for step in (0xD1B54A33, 0xABC98389, 0x8CB92BA7))


def encode_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    flat = as_flat(values)
    padded = torch.zeros(-(-flat.numel() // GROUP_SIZE) * GROUP_SIZE, dtype=torch.float32, device="cpu")
    padded[: flat.numel()] = flat
    rounded, scales = encode(padded, signed, None)
    codes = torch.empty_like(values, dtype=torch.int8 if signed else torch.uint8)
    as_flat(codes).copy_(rounded[: flat.numel()])
    return codes, scales


def decode_state(codes: Tensor, scales: Tensor) -> Tensor:
    flat = as_flat(codes)
    padded = torch.zeros(scales.numel() * GROUP_SIZE, dtype=codes.dtype, device="cpu")
    padded[: flat.numel()] = flat
    values = torch.empty_like(codes, dtype=torch.float32)
    as_flat(values).copy_(decode(padded, scales)[: flat.numel()])
    return values


def split_weights(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    param, remainder = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    split_(master, param, remainder)
    return param, remainder


def join_weights(param: Tensor, remainder: Tensor) -> Tensor:
    return join(param, remainder)


def as_flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor that fills its storage, in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def split_(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write ``master`` to ``param`` and ``remainder``."""
    if param.dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        is_nan = master.isnan()
        remainder.copy_(bits).masked_fill_(is_nan, 0)
        param.view(torch.int16).copy_(upper.masked_fill_(is_nan, 0x7FC0))
        return
    param.copy_(master)
    distance = (master - param.float()).div_(_remainder_unit(param))
    # Inf less Inf: an overflow has nothing left over.
    remainder.copy_(distance.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).round_())


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 weights of ``param`` and ``remainder``."""
    if param.dtype == torch.bfloat16:
        bits = param.view(torch.int16).int().bitwise_left_shift_(16)
        joined = bits + remainder
        # Below a zero that was written by hand, an old remainder would turn the sign bit, into a NaN: zero it stays.
        return torch.where((joined ^ bits) < 0, bits, joined).view(torch.float32)
    return param.float().add_(remainder.float().mul_(_remainder_unit(param)))


def _remainder_unit(param: Tensor) -> Tensor:
    """2^(e - 25) for an FP16 parameter of exponent e, at least -14."""
    exponent = (param.view(torch.int16).int() >> 10).bitwise_and_(31).clamp_(min=1)
    return (exponent + (127 - 15 - 25)).bitwise_left_shift_(23).view(torch.float32)


def phases(start: int, stop: int) -> Tensor:
    """A number for each element that the dither begins with, int32: a mixing of the index's bits."""
    index = torch.arange(start, stop, dtype=torch.int64, device="cpu").int()
    index *= 0x9E3779B1 - (1 << 32)
    index ^= (index >> 15).bitwise_and_(0x1FFFF)
    return index.mul_(0x85EBCA77 - (1 << 32))


def dithered(bits: Tensor, dropped: int, dither: Tensor | None) -> Tensor:
    """Magnitude bits of FP32 values plus what makes cutting off ``dropped`` bits a rounding; NaN and Inf stay."""
    addend = 1 << dropped - 1 if dither is None else (dither >> 32 - dropped).bitwise_and_((1 << dropped) - 1)
    return torch.where(bits < INFINITY_BITS, bits + addend, bits)


def encode(values: Tensor, signed: bool, dither: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a flat tensor of whole groups; ``dither`` None rounds to nearest."""
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    rounded = dithered(magnitude, 20, dither).bitwise_right_shift_(20)
    # A finite value must not round to Inf.
    rounded = torch.where(magnitude < INFINITY_BITS, rounded.clamp_(max=2039), 2040)
    if not signed:
        rounded = torch.where(magnitude > 0, rounded.clamp(min=1), rounded)
    exponents = rounded.view(-1, GROUP_SIZE).amax(1) >> 3
    largest, lift = (127, 120) if signed else (255, 248)
    codes = rounded.view(-1, GROUP_SIZE) + (lift - 8 * exponents)[:, None]
    codes = codes.clamp_(min=0 if signed else 1, max=largest).view(-1)
    codes = torch.where(rounded > 0, codes, 0)
    if signed:
        codes = torch.where(values < 0, -codes, codes)
    return codes.to(torch.int8 if signed else torch.uint8), exponents.to(torch.uint8)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of a flat tensor of whole groups."""
    signed = codes.dtype == torch.int8
    exponents = scales.int()
    wide = codes.int()
    rounded = wide.abs().view(-1, GROUP_SIZE) + (8 * exponents - (120 if signed else 248))[:, None]
    values = rounded.clamp_(min=1).view(-1).bitwise_left_shift_(20).view(torch.float32)
    values = torch.where(wide == 0, 0.0, values)
    if signed:
        values = torch.where(wide < 0, -values, values)
    broken = exponents == 255
    if broken.any():
        values.view(-1, GROUP_SIZE)[broken] = math.nan
    return values


def round_stochastically(values: Tensor, dtype: torch.dtype, dither: Tensor) -> Tensor:
    """FP32 values at 16 bits, up with the probability that makes the mean right."""
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        magnitude = dithered(bits & 0x7FFFFFFF, 16, dither) >> 16
        sign = (bits >> 16) & -0x8000
        # A cast keeps a NaN one; cutting bits off might not.
        return torch.where(values.isnan(), values.bfloat16(), (magnitude | sign).to(torch.int16).view(torch.bfloat16))
    spacing = ((bits >> 23 & 255).clamp_(min=127 - 14) - 10).bitwise_left_shift_(23).view(torch.float32)
    fraction = (dither >> 19 & 0x1FFF).float().mul_(2.0**-13)
    rounded = (values.abs() / spacing).add_(fraction).floor_().mul_(spacing)
    return torch.copysign(rounded, values).to(dtype)
