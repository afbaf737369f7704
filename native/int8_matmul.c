/* A product of two int8 matrices with their scales: mixft/cpu/int8_matmul.py. */
#include "int8_product.h"

/* out [rows, columns] = act(a_scale b_scale (a b^T - zero_point b_sum) + bias): a is [rows, inner]; b is
 * [columns, inner], or where `b_by_row` the transpose of [inner, columns]. Scales but a_scale, zero points and bias
 * may be NULL. `groups` has room for a group of strips a thread, `scratch` for the rows of int8_rows.h. */
void int8_matmul(const int8_t *a, int64_t rows, int64_t inner, int64_t columns, const int8_t *b, int b_by_row,
                 const float *a_scale, const float *b_scale, const int32_t *zero_points, const int32_t *b_sum,
                 const void *bias, int bias_dtype, int activation, void *out, int out_dtype, uint8_t *groups,
                 void *scratch)
{
    struct int8_product product =
        int8_product_of(rows, inner, columns, 1, b, b_by_row ? BY_ROW : BY_COLUMN, groups, scratch);
    product.column_scale = b_scale;
    product.zero_points = zero_points;
    product.column_sum = b_sum;
    product.bias = bias;
    product.bias_dtype = bias_dtype;
    product.activation = activation;
    product.out = out;
    product.out_dtype = out_dtype;
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        copy_row(&product.left, row, a, inner, a_scale[row]);
    multiply_int8(&product);
}
