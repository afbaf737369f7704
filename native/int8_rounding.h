/* The range, the scale and the rounding of a group of floats: kernels/int8_rounding.py. */
#ifndef MIXFT_INT8_ROUNDING_H
#define MIXFT_INT8_ROUNDING_H

#include "floats.h"
#include "inline.h"

#define SMALLEST_SCALE 0x1p-126f

/* What of an element's bits counts for the range: the magnitude where symmetric, zero where not finite. */
INLINE uint32_t counted(float value, int symmetric, int propagate)
{
    uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t kept = symmetric ? magnitude : bits;
    return propagate ? kept : kept & -(uint32_t)(magnitude < INFINITY_BITS);
}

/* Of floats as signed integers the largest is the largest; as unsigned ones, it is the most negative, if any is. */
INLINE void widen_range(int32_t *high, uint32_t *low, const float *x, int64_t length, int row, int symmetric,
                        int propagate)
{
    if (row) {
        int32_t highest = *high;
        uint32_t lowest = *low;
#pragma omp simd reduction(max : highest, lowest)
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = counted(x[i], symmetric, propagate);
            highest = (int32_t)bits > highest ? (int32_t)bits : highest;
            lowest = bits > lowest ? bits : lowest;
        }
        *high = highest;
        *low = lowest;
    } else {
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = counted(x[i], symmetric, propagate);
            high[i] = (int32_t)bits > high[i] ? (int32_t)bits : high[i];
            if (!symmetric)
                low[i] = bits > low[i] ? bits : low[i];
        }
    }
}

/* The scale, and its inverse, of a group whose largest magnitude has the bits `high`. */
INLINE void find_symmetric_scale(int32_t high, float *scale, float *inverse)
{
    float highest = float_of(high < (int32_t)INFINITY_BITS ? (uint32_t)high : INFINITY_BITS);
    highest = highest < 127 * SMALLEST_SCALE ? 127 * SMALLEST_SCALE : highest;
    *scale = highest / 127;
    *inverse = 127 / highest;
}

/* x / scale + zero point (+ noise) as a byte. A `row` has one scale for all, and neighbours in a column one each. */
INLINE void round_each(uint8_t *restrict out, const float *restrict x, const float *inverse, const float *zero,
                       const uint16_t *noise, int64_t length, int row, float lowest, float rounder)
{
    float factor = *inverse, offset = *zero;
    for (int64_t i = 0; i < length; i++) {
        float y = x[i] == x[i] ? x[i] * (row ? factor : inverse[i]) : 0;
        y += row ? offset : zero[i];
        y = y < 127 ? y : 127;
        y = y > lowest ? y : lowest;
        /* Uniform odd multiples of 2^-16 in (-1/2, 1/2). */
        if (noise)
            y += (float)(noise[i] | 1) * 0x1p-16f - 0.5f;
        out[i] = bits_of(y + rounder);
    }
}

/* The symmetric, nearest case where a group that is not finite may have any values: no other leaves the range. */
INLINE void round_inside(uint8_t *restrict out, const float *restrict x, const float *inverse, int64_t length, int row,
                         float rounder)
{
    float factor = *inverse;
    for (int64_t i = 0; i < length; i++)
        out[i] = bits_of(x[i] * (row ? factor : inverse[i]) + rounder);
}

#endif
