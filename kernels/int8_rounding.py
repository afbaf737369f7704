"""How a kernel turns floats into int8: the range of a group, its scale and zero point, and the rounding.

Kernels that quantize as a part of their work call these, so that every int8 tensor of mixft has the formulas of
``mixft.kernels.quantize``.
"""

import triton
import triton.language as tl

# The sum of 1.5 * 2^23 and any |y| < 2^22 is rounded at the unit, ties to even, and its low byte is that integer.
UNIT_ROUNDER = tl.constexpr(12582912.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def finite_range(x, SYMMETRIC: tl.constexpr, PROPAGATE: tl.constexpr):
    """The range of the finite values and zero in each row of the tile; with PROPAGATE infinite where one is not."""
    x = tl.where(tl.abs(x) < float("inf"), x, float("inf") if PROPAGATE else 0.0)
    if SYMMETRIC:
        high = tl.max(tl.abs(x), axis=1)
        low = -high
    else:
        high = tl.maximum(tl.max(x, axis=1), 0.0)
        low = tl.minimum(tl.min(x, axis=1), 0.0)
    return low, high


@triton.jit
def scale_of(low, high, SYMMETRIC: tl.constexpr):
    """Scale, its inverse and zero point, FP32, of the ranges ``low`` to ``high``."""
    if SYMMETRIC:
        high = tl.maximum(high, 127.0 * SMALLEST_SCALE)
        scale = tl.div_rn(high, 127.0)
        inverse = tl.div_rn(127.0, high)
        zero_point = 0.0 * low
    else:
        # Each end is divided by itself: their difference may exceed the largest FP32 number.
        scale = tl.maximum(tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0), SMALLEST_SCALE)
        inverse = tl.div_rn(1.0, scale)
        zero_point = (-128.0 - low * inverse) + UNIT_ROUNDER - UNIT_ROUNDER
    return scale, inverse, zero_point


@triton.jit
def rounding_noise(seed_ptr, group, first, BLOCK_N: tl.constexpr):
    """Uniform odd multiples of 2^-16 in (-1/2, 1/2) for elements ``first``... of each ``group``.

    One Philox call serves eight elements, 16 bits each. Seven rounds are the fewest that pass BigCrush
    (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
    """
    word = first // 8 + tl.arange(0, BLOCK_N // 8)
    low = (group & 0xFFFFFFFF).to(tl.uint32)[:, None] + tl.zeros_like(word)[None, :].to(tl.uint32)
    high = (group >> 32).to(tl.uint32)[:, None] + tl.zeros_like(word)[None, :].to(tl.uint32)
    counter = word.to(tl.uint32)[None, :] + tl.zeros_like(low)
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter, low, high, tl.zeros_like(low), n_rounds=7)
    ab = tl.join(tl.join(a & 0xFFFF, a >> 16), tl.join(b & 0xFFFF, b >> 16))
    cd = tl.join(tl.join(c & 0xFFFF, c >> 16), tl.join(d & 0xFFFF, d >> 16))
    bits = tl.reshape(tl.join(ab, cd), [group.shape[0], BLOCK_N])
    return (bits | 1).to(tl.float32) * (2.0**-16) - 0.5


@triton.jit
def round_to_int8(x, inverse, zero_point, seed_ptr, group, first, SYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr):
    y = tl.where(x == x, x * inverse[:, None], 0.0)
    if SYMMETRIC:
        y = tl.minimum(tl.maximum(y, -127.0), 127.0)
    else:
        y = tl.minimum(tl.maximum(y + zero_point[:, None], -128.0), 127.0)
    if seed_ptr is not None:
        y += rounding_noise(seed_ptr, group, first, BLOCK_N)
    return (y + UNIT_ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
