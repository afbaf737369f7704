/* Blocks of FP32, FP16 or BF16 in memory as FP32 in a buffer, and back.
 *
 * The codes of the dtypes are those of DTYPES in mixft/cpu/native.py. A block is short enough for the first-level
 * cache, so that a routine is written once, for FP32, and serves every dtype in one pass over memory.
 */
#ifndef MIXFT_FLOATS_H
#define MIXFT_FLOATS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, FLOAT16, BFLOAT16 };

#define INFINITY_BITS 0x7F800000u

/* 1.5 * 2^23: added to |y| < 2^22 it rounds y at the unit, ties to even, and the low bits are that integer. */
#define UNIT_ROUNDER 12582912.0f

static inline int64_t bytes_of(int dtype)
{
    return dtype == FLOAT32 ? 4 : 2;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* 1 for a NaN or an infinity. */
static inline int is_nonfinite(float value)
{
    return (bits_of(value) & 0x7FFFFFFFu) >= INFINITY_BITS;
}

/* Element `offset` of an array of `dtype`. */
static inline void *element(const void *array, int64_t offset, int dtype)
{
    return (char *)array + offset * bytes_of(dtype);
}

/* Elements up to which whole vectors of sixteen, and of eight, reach. */
#ifdef __AVX512F__
#define BY_SIXTEEN(length) ((length) / 16 * 16)
#else
#define BY_SIXTEEN(length) ((int64_t)0)
#endif
#define BY_EIGHT(length) ((length) / 8 * 8)

static inline void load_floats(float *restrict out, const void *restrict in, int64_t length, int dtype)
{
    const uint16_t *half = in;
    if (dtype == FLOAT32) {
        memcpy(out, in, 4 * length);
    } else if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < length; i++)
            out[i] = float_of((uint32_t)half[i] << 16);
    } else {
#ifdef __AVX512F__
        for (int64_t i = 0; i < BY_SIXTEEN(length); i += 16)
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(half + i))));
#endif
        for (int64_t i = BY_SIXTEEN(length); i < BY_EIGHT(length); i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
        for (int64_t i = BY_EIGHT(length); i < length; i++)
            out[i] = _cvtsh_ss(half[i]);
    }
}

/* Rounds to nearest, ties to even; a NaN stays one. */
static inline void store_floats(void *restrict out, const float *restrict in, int64_t length, int dtype)
{
    uint16_t *half = out;
    if (dtype == FLOAT32) {
        memcpy(out, in, 4 * length);
    } else if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = bits_of(in[i]);
            uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
            half[i] = (bits & 0x7FFFFFFFu) > INFINITY_BITS ? 0x7FC0 : rounded;
        }
    } else {
#ifdef __AVX512F__
        for (int64_t i = 0; i < BY_SIXTEEN(length); i += 16)
            _mm256_storeu_si256((__m256i *)(half + i),
                                _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (int64_t i = BY_SIXTEEN(length); i < BY_EIGHT(length); i += 8)
            _mm_storeu_si128((__m128i *)(half + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
        for (int64_t i = BY_EIGHT(length); i < length; i++)
            half[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
    }
}

#endif
