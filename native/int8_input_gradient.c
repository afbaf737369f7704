/* The gradient of a layer's input through its int8 weight, one product of bytes: mixft/cpu/int8_input_gradient.py. */
#include "int8_product.h"

/* out [rows, columns] = s (q weight) + left right with grad [rows, inner] * weight_scale = s q, each row with its s.
 * `weight` is [inner, columns], left [rows, rank] and right [rank, columns]; `groups` has room for a group of strips a
 * thread, `scratch` for the rows of int8_rows.h. */
void int8_input_gradient(const void *grad, int dtype, int64_t rows, int64_t inner, int64_t columns,
                         const int8_t *weight, const float *weight_scale, const float *left, const float *right,
                         int64_t rank, void *out, uint8_t *groups, void *scratch)
{
    struct int8_product product = int8_product_of(rows, inner, columns, 1, weight, BY_ROW, groups, scratch);
    product.added = (struct low_rank){left, right, rank};
    product.out = out;
    product.out_dtype = dtype;
    quantize_rows(&product.left, grad, dtype, rows, inner, weight_scale, 0, 0);
    multiply_int8(&product);
}
