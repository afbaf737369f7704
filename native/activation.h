/* The activations of kernels/activation.py and their slopes, in place on FP32 buffers.
 *
 * The codes are the positions of ACTIVATIONS in mixft/cpu/activation.py. The loops are free of branches and calls, so
 * that the compiler vectorizes them. The polynomials are minimax fits of the relative error, below 1e-8 before
 * rounding.
 */
#ifndef MIXFT_ACTIVATION_H
#define MIXFT_ACTIVATION_H

#include "floats.h"

enum { NONE, RELU, GELU, GELU_TANH, SILU };

/* Beyond 64 every slope is within 1e-25 of 0 or 1; without the limit an infinity would give 0 * Inf. */
#define SLOPE_LIMIT 64.0f

/* exp(x): 2^n e^r with |r| <= log(2) / 2. Infinity above 88, 0 below -87; a NaN stays one. */
static inline float exponential(float x)
{
    float shifted = __builtin_fmaf(x, 1.44269504f, UNIT_ROUNDER), n = shifted - UNIT_ROUNDER;
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 0.00138131445f;
    p = __builtin_fmaf(p, r, 0.00836941884f);
    p = __builtin_fmaf(p, r, 0.0416684568f);
    p = __builtin_fmaf(p, r, 0.166665148f);
    p = __builtin_fmaf(p, r, 0.499999931f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    float y = p * float_of((bits_of(shifted) + 127) << 23);
    y = x > 88.0f ? float_of(INFINITY_BITS) : y;
    return x < -87.0f ? 0.0f : y;
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

/* The normal distribution at -|x|, given exp(-x^2 / 2): that times a polynomial in 1 / (1 + 0.37 |x| / sqrt(2)). */
static inline float normal_tail(float x, float decay)
{
    float t = 1.0f / __builtin_fmaf(0.261629522f, __builtin_fabsf(x), 1.0f);
    float q = 0.032272795f;
    q = __builtin_fmaf(q, t, -0.158063986f);
    q = __builtin_fmaf(q, t, 0.256859417f);
    q = __builtin_fmaf(q, t, -0.158281818f);
    q = __builtin_fmaf(q, t, 0.166434038f);
    q = __builtin_fmaf(q, t, 0.0484240195f);
    q = __builtin_fmaf(q, t, 0.104410338f);
    q = __builtin_fmaf(q, t, 0.103526644f);
    q = __builtin_fmaf(q, t, 0.104418555f);
    return q * t * decay;
}

static inline float normal_distribution(float x, float decay)
{
    float tail = normal_tail(x, decay);
    return x < 0.0f ? tail : 1.0f - tail;
}

/* 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh is x times the sigmoid of it. */
static inline float tanh_argument(float x)
{
    return x * __builtin_fmaf(0.0713548163f, x * x, 1.59576912f);
}

static inline float limited(float x)
{
    x = x > SLOPE_LIMIT ? SLOPE_LIMIT : x;
    return x < -SLOPE_LIMIT ? -SLOPE_LIMIT : x;
}

static inline float gelu_slope(float x)
{
    float decay = exponential(-0.5f * x * x);
    return __builtin_fmaf(0.398942280f * x, decay, normal_distribution(x, decay));
}

/* s(u) (1 + a (1 - s(u))) of the sigmoid s; 1 - s(u) is s(-u), for the difference would lose the digits of its tail. */
static inline float gated_slope(float u, float a)
{
    float decay = exponential(-__builtin_fabsf(u)), above = 1.0f / (1.0f + decay), below = decay * above;
    float gate = u < 0.0f ? below : above, rest = u < 0.0f ? above : below;
    return gate * __builtin_fmaf(a, rest, 1.0f);
}

static inline float gelu_tanh_slope(float x)
{
    return gated_slope(tanh_argument(x), x * __builtin_fmaf(0.214064449f, x * x, 1.59576912f));
}

static inline float silu_slope(float x)
{
    return gated_slope(x, x);
}

static inline void activate(float *values, int64_t length, int activation)
{
    if (activation == RELU)
        for (int64_t i = 0; i < length; i++)
            values[i] = values[i] < 0.0f ? 0.0f : values[i];
    else if (activation == GELU)
        for (int64_t i = 0; i < length; i++)
            values[i] *= normal_distribution(values[i], exponential(-0.5f * values[i] * values[i]));
    else if (activation == GELU_TANH)
        for (int64_t i = 0; i < length; i++)
            values[i] *= sigmoid(tanh_argument(values[i]));
    else if (activation == SILU)
        for (int64_t i = 0; i < length; i++)
            values[i] *= sigmoid(values[i]);
}

/* grad *= the activation's slope at `kept`; where ReLU's is 0, so is the product, whatever grad was. */
static inline void multiply_by_slope(float *restrict grad, const float *restrict kept, int64_t length, int activation)
{
    if (activation == RELU)
        for (int64_t i = 0; i < length; i++)
            grad[i] = kept[i] <= 0.0f ? 0.0f : grad[i];
    else if (activation == GELU)
        for (int64_t i = 0; i < length; i++)
            grad[i] *= gelu_slope(limited(kept[i]));
    else if (activation == GELU_TANH)
        for (int64_t i = 0; i < length; i++)
            grad[i] *= gelu_tanh_slope(limited(kept[i]));
    else if (activation == SILU)
        for (int64_t i = 0; i < length; i++)
            grad[i] *= silu_slope(limited(kept[i]));
}

#endif
