/* Rows of floats as int8 values for the products of int8_tile.h. For AVX512-VNNI alone, as those. */
#ifndef MIXFT_INT8_ROWS_H
#define MIXFT_INT8_ROWS_H

#include "blocks.h"
#include "floats.h"
#include "int8_tile.h"

#define SMALLEST_SCALE 0x1p-126f

/* int8 values [rows, stride], the scale of each row, and 128 times the sum of its values. */
struct quantized_rows {
    int8_t *values;
    int64_t stride;
    float *scale;
    int32_t *sum;
};

/* Rows of `inner` values in memory that has room for inner + 144 bytes a row. */
static inline struct quantized_rows rows_at(void *memory, int64_t rows, int64_t inner)
{
    /* An odd number of cache lines, or the rows of a tile would displace each other from the first-level cache. */
    int64_t stride = parts_of(inner + QUAD, 64) * 64 | 64;
    float *scale = (float *)((int8_t *)memory + rows * stride);
    return (struct quantized_rows){memory, stride, scale, (int32_t *)(scale + rows)};
}

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline __mmask16 first(int64_t count)
{
    return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

/* The larger of `high` and the largest magnitude; NaN counts as larger than infinity. */
static inline float magnitude(const float *values, int64_t length, float high)
{
    int32_t largest = bits_of(high);
    for (int64_t i = 0; i < length; i++) {
        int32_t bits = bits_of(values[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

/* round(values * inverse + zero_point), ties to even, clamped to int8; NaN counts as zero. Returns the sum. */
static inline int32_t round_values(int8_t *out, const float *values, int64_t length, float inverse, float zero_point)
{
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < length; i += LANES) {
        __mmask16 valid = first(length - i);
        __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, values + i), _mm512_set1_ps(inverse));
        y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y);
        y = _mm512_add_ps(y, _mm512_set1_ps(zero_point));
        y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(-128)), _mm512_set1_ps(127));
        __m512i rounded = _mm512_maskz_cvtps_epi32(valid, y);
        sums = _mm512_add_epi32(sums, rounded);
        _mm_mask_storeu_epi8(out + i, valid, _mm512_cvtepi32_epi8(rounded));
    }
    return _mm512_reduce_add_epi32(sums);
}

/* `length` values of a row as FP32, times those of `factor` where there is one: where they are, or in `buffer`. */
static inline const float *as_floats(float *restrict buffer, const void *row, const float *restrict factor,
                                     int64_t start, int64_t length, int dtype)
{
    if (dtype == FLOAT32 && !factor)
        return (const float *)row + start;
    load_floats(buffer, element(row, start, dtype), length, dtype);
    if (factor)
        for (int64_t i = 0; i < length; i++)
            buffer[i] *= factor[start + i];
    return buffer;
}

/* Row `row` of `input` [rows, inner], times `factor` [inner] or as it is. A `scale` of zero stands for the row's own. */
static inline void quantize_row(const struct quantized_rows *to, int64_t row, const void *input, int dtype,
                                int64_t inner, const float *factor, float scale, int zero_point)
{
    int8_t *values = to->values + row * to->stride;
    float buffer[BLOCK], inverse = 1 / scale;
    uint32_t sum = 0;
    input = element(input, row * inner, dtype);
    if (!scale) {
        float high = 127 * SMALLEST_SCALE;
        for (int64_t start = 0; start < inner; start += BLOCK) {
            int64_t length = least(inner - start, BLOCK);
            high = magnitude(as_floats(buffer, input, factor, start, length, dtype), length, high);
        }
        scale = high / 127;
        inverse = 127 / high;
    }
    for (int64_t start = 0; start < inner; start += BLOCK) {
        int64_t length = least(inner - start, BLOCK);
        const float *floats = as_floats(buffer, input, factor, start, length, dtype);
        sum += round_values(values + start, floats, length, inverse, zero_point);
    }
    memset(values + inner, 0, QUAD);
    to->scale[row] = scale;
    to->sum[row] = 128 * sum;
}

/* A product of floats that is added to one of int8: left [rows, rank] right [rank, columns]. */
struct low_rank {
    const float *left, *right;
    int64_t rank;
};

/* `y`, half a strip of row `row` from column `column` on, with the low-rank product added. */
static inline __m512 with_low_rank(__m512 y, const struct low_rank *added, int64_t row, int64_t column,
                                   int64_t columns)
{
    const float *left = added->left + row * added->rank, *right = added->right + column;
    __mmask16 valid = first(columns - column);
    for (int64_t i = 0; i < added->rank; i++)
        y = _mm512_fmadd_ps(_mm512_set1_ps(left[i]), _mm512_maskz_loadu_ps(valid, right + i * columns), y);
    return y;
}

#endif
