/* What follows an integer product: mixft/cpu/int8_epilogue.py. */
#include "blocks.h"
#include "floats.h"

struct arguments {
    const int32_t *product;
    int64_t columns;
    const float *row_scale, *column_scale;
    const int32_t *zero_point, *column_sum;
    const void *bias;
    int bias_dtype;
    void *out;
    int out_dtype;
};

/* Columns `start` to `start + length` of one row. Through a buffer: `out` may be the product's own memory. */
static void finish_block(const struct arguments *to, int64_t row, int64_t start, int64_t length)
{
    const int32_t *product = to->product + row * to->columns + start;
    float wide[BLOCK], bias[BLOCK], row_scale = to->row_scale[row];
    if (to->zero_point) {
        int32_t zero_point = to->zero_point[row];
        const int32_t *sum = to->column_sum + start;
        for (int64_t i = 0; i < length; i++)
            wide[i] = product[i] - zero_point * sum[i];
    } else {
        for (int64_t i = 0; i < length; i++)
            wide[i] = product[i];
    }
    if (to->column_scale) {
        const float *column_scale = to->column_scale + start;
        for (int64_t i = 0; i < length; i++)
            wide[i] = wide[i] * column_scale[i] * row_scale;
    } else {
        for (int64_t i = 0; i < length; i++)
            wide[i] *= row_scale;
    }
    if (to->bias) {
        load_floats(bias, element(to->bias, start, to->bias_dtype), length, to->bias_dtype);
        for (int64_t i = 0; i < length; i++)
            wide[i] += bias[i];
    }
    store_floats(element(to->out, row * to->columns + start, to->out_dtype), wide, length, to->out_dtype);
}

/* out [rows, columns] = row_scale column_scale (product - zero_point column_sum) + bias, each but row_scale or none;
 * where out is FP32 it may be the product itself. */
void int8_epilogue(const int32_t *product, int64_t rows, int64_t columns, const float *row_scale,
                   const float *column_scale, const int32_t *zero_point, const int32_t *column_sum, const void *bias,
                   int bias_dtype, void *out, int out_dtype)
{
    struct arguments to = {product,    columns, row_scale,  column_scale, zero_point,
                           column_sum, bias,    bias_dtype, out,          out_dtype};
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t start = 0; start < columns; start += BLOCK)
            finish_block(&to, row, start, columns - start < BLOCK ? columns - start : BLOCK);
}
