"""Optimizer state in fewer bits: split FP32 weights, 8-bit block-wise codes, BF16, and the dither that rounds them.

**Split weights.** A 16-bit parameter and an int16 remainder that together are the FP32 weight. BF16: the parameter is
the upper half of the weight's bits, rounded half up in magnitude, so that what the bits exceed it by always fits 16
bits (ties to even would not): exact for every value. FP16: nearest even, and the remainder counts units of 2^(e - 25),
e the parameter's exponent, at least -14: exact from 2^-16 up, an error of at most 2^-40 below.

**Codes.** Thirty-two neighbours share the exponent of the largest as their scale, as in the MX formats (Open Compute
Project, 2023). A code counts eighths of an octave, the FP32 bits cut to three mantissa bits, down from the top of
that exponent's octave: int8, 127 magnitudes, 16 octaves for first moments; uint8, 255 codes, 32 octaves for second
moments, of which none but an exact zero becomes zero. In a simulation of 1,500 AdamW steps the update differed from
that of FP32 moments by 11% on heavy-tailed gradients, 11% on sparse ones, 21% where magnitudes within a group spread
widely and 12% on decaying ones; square-root and softsign companding (FlashOptim) by 21, 33, 66 and 14%. The dynamic
map of Dettmers et al. (arXiv:2110.02861) makes zeros of small second moments, and updates exploded. Twelfths of an
octave were finer on three of the streams (9%), but 54% off on the wide one.

**Dither.** With beta2 = 0.999 a second moment moves 0.1% a step, less than half a step of these formats and of BF16, so
rounding to nearest would hold it fast. State is therefore rounded stochastically: each element adds, below the bits
that are kept, a number that begins at a hash of its index and moves on each step by the irrational steps of the
additive sequence R3 (Roberts 2018). It is uniform over the steps, so the mean is right; a drift is followed with a
bounded lag where independent random numbers would wander; and a resumed run repeats it, whatever the launch.

Rounding a value that the format holds gives that value, dithered or not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .multi_tensor import TRITON_TYPES, load
from .variant import Variant

GROUP_SIZE = tl.constexpr(32)
# Steps of the dither: 2^32 times g^-1, g^-2 and g^-3, g^4 = g + 1.
FIRST_MOMENT = tl.constexpr(0xD1B54A33)
SECOND_MOMENT = tl.constexpr(0xABC98389)
PARAMETER = tl.constexpr(0x8CB92BA7)
INFINITY_BITS = tl.constexpr(0x7F800000)

BLOCK = 1024


@triton.jit
def phase(element):
    """Where the dither of an element begins, from its index: a uint32 whose upper bits are well mixed."""
    x = element.to(tl.uint32) * 0x9E3779B1
    return (x ^ (x >> 15)) * 0x85EBCA77


@triton.jit
def magnitude_bits(value):
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(exponent):
    """2^exponent in FP32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_stochastically(value, bits, TYPE: tl.constexpr):
    """An FP32 value at FP16 or BF16, up with the probability that makes the mean right; ``bits`` are uint32."""
    magnitude = magnitude_bits(value)
    sign = value.to(tl.int32, bitcast=True) ^ magnitude
    if tl.bfloat16 == TYPE:
        cut = (magnitude + (bits >> 16).to(tl.int32)) & 0x7FFF0000
        rounded = tl.where(magnitude < INFINITY_BITS, cut, magnitude)
    else:
        # A multiple of the spacing of FP16 there; the fraction has as many bits as the value has below it.
        exponent = tl.maximum((magnitude >> 23) - 127, -14) - 10
        fraction = (bits >> 19).to(tl.int32).to(tl.float32) * (1.0 / 8192.0)
        multiple = tl.floor(tl.abs(value) * power_of_two(-exponent) + fraction)
        rounded = (multiple * power_of_two(exponent)).to(tl.int32, bitcast=True)
    return (rounded | sign).to(tl.float32, bitcast=True).to(TYPE)


@triton.jit
def join_weight(param, remainder, TYPE: tl.constexpr):
    """The FP32 weight of a parameter and its remainder; a BF16 parameter comes as int16 bits."""
    if tl.bfloat16 == TYPE:
        bits = param.to(tl.int32) << 16
        joined = bits + remainder.to(tl.int32)
        # Below a zero that was written by hand, an old remainder would turn the sign bit, into a NaN: zero it stays.
        return tl.where((joined ^ bits) < 0, bits, joined).to(tl.float32, bitcast=True)
    else:
        return param.to(tl.float32) + remainder.to(tl.float32) * power_of_two(_half_exponent(param) - 25)


@triton.jit
def split_weight(weight, TYPE: tl.constexpr):
    """A parameter and its int16 remainder; a BF16 parameter as int16 bits."""
    bits = weight.to(tl.int32, bitcast=True)
    if tl.bfloat16 == TYPE:
        is_nan = weight != weight
        upper = tl.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16)
        return upper.to(tl.int16), tl.where(is_nan, 0, bits).to(tl.int16)
    else:
        param = weight.to(tl.float16)
        units = (weight - param.to(tl.float32)) * power_of_two(25 - _half_exponent(param))
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. An overflow has nothing left over.
        whole = (units + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        return param, tl.where(tl.abs(units) <= 16384.0, whole, 0).to(tl.int16)


@triton.jit
def _half_exponent(param):
    return tl.maximum((magnitude_bits(param.to(tl.float32)) >> 23) - 127, -14)


@triton.jit
def spread(groups, SIZE: tl.constexpr):
    """One value a group to one an element."""
    rows: tl.constexpr = SIZE // GROUP_SIZE
    return tl.reshape(tl.broadcast_to(tl.expand_dims(groups, 1), [rows, GROUP_SIZE]), [SIZE])


@triton.jit
def encode(value, bits, SIGNED: tl.constexpr, DITHERED: tl.constexpr):
    """Codes (int32) of a block of whole groups, and the exponent (int32) of each group."""
    size: tl.constexpr = value.shape[0]
    magnitude = magnitude_bits(value)
    addend = (bits >> 12).to(tl.int32) if DITHERED else 0x80000
    # A finite value must not round to Inf, nor the bits of a NaN overflow.
    eighths = tl.minimum((tl.minimum(magnitude, INFINITY_BITS - 1) + addend) >> 20, 2039)
    eighths = tl.where(magnitude < INFINITY_BITS, eighths, 2040)
    if not SIGNED:
        eighths = tl.where(magnitude > 0, tl.maximum(eighths, 1), eighths)
    exponent = tl.max(tl.reshape(eighths, [size // GROUP_SIZE, GROUP_SIZE]), axis=1) >> 3
    if SIGNED:
        code = tl.minimum(tl.maximum(eighths - spread(8 * exponent - 120, size), 0), 127)
        code = tl.where(value < 0, -code, code)
    else:
        code = tl.minimum(tl.maximum(eighths - spread(8 * exponent - 248, size), 1), 255)
    return tl.where(eighths > 0, code, 0), exponent


@triton.jit
def decode(code, exponent, SIGNED: tl.constexpr):
    """FP32 values of a block of codes (int32) with the exponent (int32) of each group."""
    size: tl.constexpr = code.shape[0]
    # A group that held a NaN or Inf is all NaN.
    lift = tl.where(exponent == 255, 0x1000, 8 * exponent - (120 if SIGNED else 248))
    eighths = tl.maximum(tl.abs(code) + spread(lift, size), 1)
    value = tl.where(code == 0, 0, eighths << 20).to(tl.float32, bitcast=True)
    value = tl.where(eighths >= 0x1000, float("nan"), value)
    if SIGNED:
        value = tl.where(code < 0, -value, value)
    return value


@triton.jit
def load_state(pointer, scale, mask, group_mask, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    """A block of state in FP32; ``scale`` and ``group_mask`` are those of its groups, for codes."""
    stored = load(pointer, mask)
    if FORMAT == "code":
        return decode(stored.to(tl.int32), load(scale, group_mask).to(tl.int32), SIGNED)
    else:
        return stored.to(tl.float32)


@triton.jit
def store_state(pointer, scale, mask, group_mask, value, bits, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    if FORMAT == "code":
        code, exponent = encode(value, bits, SIGNED, True)
        tl.store(pointer, code.to(tl.int8 if SIGNED else tl.uint8), mask=mask)
        tl.store(scale, exponent.to(tl.uint8), mask=group_mask)
    elif FORMAT == "bf16":
        tl.store(pointer, round_stochastically(value, bits, tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def encode_kernel(values, codes, scales, size, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    groups: tl.constexpr = BLOCK // GROUP_SIZE
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    group = start // GROUP_SIZE + tl.arange(0, groups)
    code, exponent = encode(tl.load(values + at, mask=at < size, other=0.0), at, SIGNED, False)
    tl.store(codes + at, code.to(tl.int8 if SIGNED else tl.uint8), mask=at < size)
    tl.store(scales + group, exponent.to(tl.uint8), mask=group * GROUP_SIZE < size)


@triton.jit
def decode_kernel(codes, scales, values, size, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    groups: tl.constexpr = BLOCK // GROUP_SIZE
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    group = start // GROUP_SIZE + tl.arange(0, groups)
    exponent = tl.load(scales + group, mask=group * GROUP_SIZE < size, other=0)
    code = tl.load(codes + at, mask=at < size, other=0)
    tl.store(values + at, decode(code.to(tl.int32), exponent.to(tl.int32), SIGNED), mask=at < size)


@triton.jit
def split_kernel(masters, parameters, remainders, size, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    param, remainder = split_weight(tl.load(masters + at, mask=at < size, other=0.0), TYPE)
    tl.store(parameters + at, param, mask=at < size)
    tl.store(remainders + at, remainder, mask=at < size)


@triton.jit
def join_kernel(parameters, remainders, masters, size, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    param = tl.load(parameters + at, mask=at < size, other=0)
    weight = join_weight(param, tl.load(remainders + at, mask=at < size, other=0), TYPE)
    tl.store(masters + at, weight, mask=at < size)


def encode_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of FP32 ``values``, int8 or uint8, and their uint8 scales, rounded to nearest."""
    codes = torch.empty_like(values, dtype=torch.int8 if signed else torch.uint8)
    groups = triton.cdiv(values.numel(), GROUP_SIZE.value)
    scales = torch.empty(groups, dtype=torch.uint8, device=values.device)
    _launch(encode_kernel, values, codes, scales, SIGNED=signed)
    return codes, scales


def decode_state(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of ``codes`` with their ``scales``."""
    values = torch.empty_like(codes, dtype=torch.float32)
    _launch(decode_kernel, codes, scales, values, SIGNED=codes.dtype == torch.int8)
    return values


def split_weights(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP32 ``master`` as a parameter of ``dtype`` and its int16 remainder."""
    param, remainder = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    _launch(split_kernel, master, _bits_if_bf16(param), remainder, TYPE=TRITON_TYPES[dtype])
    return param, remainder


def join_weights(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 weights of a 16-bit ``param`` and its int16 ``remainder``."""
    master = torch.empty_like(param, dtype=torch.float32)
    _launch(join_kernel, _bits_if_bf16(param), remainder, master, TYPE=TRITON_TYPES[param.dtype])
    return master


def _bits_if_bf16(param: Tensor) -> Tensor:
    return param.view(torch.int16) if param.dtype == torch.bfloat16 else param


def _launch(kernel, first: Tensor, *rest: Tensor, **constexprs) -> None:
    if first.numel() == 0:
        return
    with torch.cuda.device_of(first):
        grid = (triton.cdiv(first.numel(), BLOCK),)
        kernel[grid](first, *rest, first.numel(), BLOCK=BLOCK, num_warps=4, num_stages=1, **constexprs)


def variants(arch: Architecture) -> list[Variant]:
    """None with wide accesses: these run once a checkpoint."""
    del arch
    tensors = {
        "encode": (encode_kernel, {"values": "*fp32", "codes": "*{}", "scales": "*u8"}),
        "decode": (decode_kernel, {"codes": "*{}", "scales": "*u8", "values": "*fp32"}),
        "split": (split_kernel, {"masters": "*fp32", "parameters": "*{}", "remainders": "*i16"}),
        "join": (join_kernel, {"parameters": "*{}", "remainders": "*i16", "masters": "*fp32"}),
    }
    listed = []
    for name, (function, pointers) in tensors.items():
        if name in ("encode", "decode"):
            kinds = {"i8": {"SIGNED": True}, "u8": {"SIGNED": False}}
        else:
            kinds = {"fp16": {"TYPE": tl.float16}, "i16": {"TYPE": tl.bfloat16}}
        for kind, constexprs in kinds.items():
            listed.append(
                Variant(
                    name=f"{name}[{kind}]",
                    function=function,
                    signature={key: value.format(kind) for key, value in pointers.items()} | {"size": "i64"},
                    constexprs=constexprs | {"BLOCK": BLOCK},
                    divisible_by_16=tuple(pointers),
                    wide_loads=False,
                )
            )
    return listed
