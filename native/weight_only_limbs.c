/* Rows of floats times an int8 weight, by three bytes of each: mixft/cpu/int8_matmul.py. */
#include <math.h>

#include "int8_product.h"

/* Row `row` of `input` [rows, inner], finite, as limbs of a fixed point number:
 *
 *     scale * (limb[0] + limb[1] / 256 + limb[2] / 65536)
 *
 * with a power of two for a scale, so large that the first limb does not overflow. */
static inline void split_row(const struct quantized_rows *quantized, int64_t row, const void *input, int dtype,
                             int64_t rows, int64_t inner)
{
    row_value *limbs[LIMBS];
    float buffer[BLOCK], high = 0x1p-100f;
    uint32_t sums[LIMBS] = {0};
    int exponent;
    input = element(input, row * inner, dtype);
    for (int64_t start = 0; start < inner; start += BLOCK) {
        int64_t length = least(inner - start, BLOCK);
        high = magnitude(as_floats(buffer, input, NULL, start, length, dtype), length, high);
    }
    /* Limbs reach to 127.498 on either side. */
    float mantissa = frexpf(high, &exponent);
    exponent += mantissa > 0.996f;
    float factor = ldexpf(1, 23 - exponent), scale = ldexpf(1, exponent - 7);
    for (int limb = 0; limb < LIMBS; limb++)
        limbs[limb] = quantized->values + (limb * rows + row) * quantized->stride;
    for (int64_t start = 0; start < inner; start += BLOCK) {
        int64_t length = least(inner - start, BLOCK);
        const float *floats = as_floats(buffer, input, NULL, start, length, dtype);
        for (int limb = 0; limb < LIMBS; limb++) {
            row_value *restrict out = limbs[limb] + start;
            int shift = 8 * (LIMBS - 1 - limb);
            int32_t sum = 0;
            for (int64_t i = 0; i < length; i++) {
                int32_t fixed = (int32_t)rintf(floats[i] * factor) + 0x808080;
                int32_t value = (fixed >> shift & 255) - 128;
                out[i] = value;
                sum += value;
            }
            sums[limb] += sum;
        }
    }
    for (int limb = 0; limb < LIMBS; limb++)
        end_row(quantized, limb * rows + row, inner, scale, sums[limb]);
}

/* out [rows, columns] = act(weight_scale * (input weight^T) + bias), input [rows, inner] to within 2^-22 of each row's
 * largest magnitude. `weight` is [columns, inner]; `groups` has room for a group of strips a thread, `scratch` for
 * LIMBS times the rows of int8_rows.h. */
void weight_only_limbs(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                       const int8_t *weight, const float *weight_scale, const void *bias, int bias_dtype,
                       int activation, void *out, int out_dtype, uint8_t *groups, void *scratch)
{
    struct int8_product product = int8_product_of(rows, inner, columns, LIMBS, weight, BY_COLUMN, groups, scratch);
    product.column_scale = weight_scale;
    product.bias = bias;
    product.bias_dtype = bias_dtype;
    product.activation = activation;
    product.out = out;
    product.out_dtype = out_dtype;
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        split_row(&product.left, row, input, input_dtype, rows, inner);
    multiply_int8(&product);
}
