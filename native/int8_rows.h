/* Rows of int8 values for the products of int8_tile.h, from floats or as they are. */
#ifndef MIXFT_INT8_ROWS_H
#define MIXFT_INT8_ROWS_H

#include "blocks.h"
#include "int8_rounding.h"
#include "int8_tile.h"

/* Values [rows, stride], zeros at the end of each row, its scale, and OFFSET times the sum of its values. */
struct quantized_rows {
    row_value *values;
    int64_t stride;
    float *scale;
    int32_t *sum;
};

/* Bytes from one row of `inner` values to the next. */
static inline int64_t stride_of(int64_t inner)
{
    /* An odd number of cache lines, or the rows of a tile would displace each other from the first-level cache. */
    return parts_of((inner + DEPTH) * sizeof(row_value), 64) * 64 | 64;
}

/* Bytes beside its values that a row takes at most: zeros up to its stride, a scale and a sum. */
enum { ROW_BYTES = DEPTH * sizeof(row_value) + 2 * 64 + sizeof(float) + sizeof(int32_t) };

static inline struct quantized_rows rows_at(void *memory, int64_t rows, int64_t inner)
{
    float *scale = (float *)((char *)memory + rows * stride_of(inner));
    return (struct quantized_rows){memory, stride_of(inner) / sizeof(row_value), scale, (int32_t *)(scale + rows)};
}

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
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
static inline int32_t round_values(row_value *restrict out, const float *restrict values, int64_t length,
                                   float inverse, float zero_point)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < length; i++) {
        float y = values[i] * inverse;
        y = (y == y ? y : 0) + zero_point;
        y = y < 127 ? y : 127;
        y = y > -128 ? y : -128;
        int32_t rounded = bits_of(y + UNIT_ROUNDER) - bits_of(UNIT_ROUNDER);
        out[i] = rounded;
        sum += rounded;
    }
    return sum;
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

static inline void end_row(const struct quantized_rows *quantized, int64_t row, int64_t inner, float scale,
                           uint32_t sum)
{
    memset(quantized->values + row * quantized->stride + inner, 0, (quantized->stride - inner) * sizeof(row_value));
    quantized->scale[row] = scale;
    quantized->sum[row] = OFFSET * sum;
}

/* Row `row` of `input` [rows, inner], times `factor` [inner] if given. A `scale` of zero stands for the row's own. */
static inline void quantize_row(const struct quantized_rows *quantized, int64_t row, const void *input, int dtype,
                                int64_t inner, const float *factor, float scale, int zero_point)
{
    row_value *values = quantized->values + row * quantized->stride;
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
    end_row(quantized, row, inner, scale, sum);
}

/* quantize_row for each of `rows` rows. */
static inline void quantize_rows(const struct quantized_rows *quantized, const void *input, int dtype, int64_t rows,
                                 int64_t inner, const float *factor, float scale, int zero_point)
{
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        quantize_row(quantized, row, input, dtype, inner, factor, scale, zero_point);
}

/* Row `row` of `input` [rows, inner], which is int8 already. */
static inline void copy_row(const struct quantized_rows *quantized, int64_t row, const int8_t *restrict input,
                            int64_t inner, float scale)
{
    row_value *restrict values = quantized->values + row * quantized->stride;
    int32_t sum = 0;
    input += row * inner;
    for (int64_t i = 0; i < inner; i++) {
        values[i] = input[i];
        sum += input[i];
    }
    end_row(quantized, row, inner, scale, sum);
}

#endif
