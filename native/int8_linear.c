/* A linear layer with an int8 weight whose input is quantized on the way: mixft/cpu/int8_layer.py. */
#include "int8_product.h"

/* What callers have to know of the room that rows and packed strips need. */
const int32_t int8_strip = STRIP, int8_depth = DEPTH, int8_row_value_bytes = sizeof(row_value);
const int32_t int8_group_bytes = GROUP_BYTES, int8_row_bytes = ROW_BYTES;

/* out [rows, columns] = act(s * weight_scale * ((q - zero_point) w^T) + bias + left right) with input [rows, inner] =
 * s (q - zero_point): a static layer, with a weight_sum, has its s from `input_scale`; a dynamic one finds it in each
 * row, with no zero point. `weight` is [columns, inner], left [rows, rank] and right [rank, columns]; `groups` has room
 * for a group of strips a thread, `scratch` for the rows of int8_rows.h. */
void int8_linear(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                 const int8_t *weight, const float *weight_scale, const int32_t *weight_sum, float input_scale,
                 int zero_point, const void *bias, int bias_dtype, int activation, const float *left,
                 const float *right, int64_t rank, void *out, int out_dtype, uint8_t *groups,
                 void *scratch)
{
    struct int8_product product = int8_product_of(rows, inner, columns, 1, weight, BY_COLUMN, groups, scratch);
    product.column_scale = weight_scale;
    product.zero_point = zero_point;
    product.column_sum = weight_sum;
    product.bias = bias;
    product.bias_dtype = bias_dtype;
    product.activation = activation;
    product.added = (struct low_rank){left, right, rank};
    product.out = out;
    product.out_dtype = out_dtype;
    float scale = weight_sum ? input_scale : 0;
    quantize_rows(&product.left, input, input_dtype, rows, inner, NULL, scale, zero_point);
    multiply_int8(&product);
}
