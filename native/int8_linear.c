/* A linear layer with an int8 weight whose input is quantized on the way: mixft/cpu/int8_layer.py. */
#include "int8_product.h"

/* What callers have to know of a packed weight, and of the room that rows need. */
const int32_t int8_strip = STRIP, int8_depth = DEPTH, int8_row_value_bytes = sizeof(row_value);

/* out [rows, columns] = act(s * weight_scale * ((q - zero_point) w^T) + bias + left right) with input [rows, inner] =
 * s (q - zero_point): a static layer, with a weight_sum, has its s from `input_scale`; a dynamic one finds it in each
 * row, with no zero point. `weight` is packed, left is [rows, rank] and right [rank, columns], and `scratch` has room
 * for the rows of int8_rows.h. */
void int8_linear(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                 const uint8_t *weight, const float *weight_scale, const int32_t *weight_sum, float input_scale,
                 int zero_point, const void *bias, int bias_dtype, int activation, const float *left,
                 const float *right, int64_t rank, void *out, int out_dtype, void *scratch)
{
    struct int8_product product = {.rows = rows,
                                   .inner = inner,
                                   .columns = columns,
                                   .left = rows_at(scratch, rows, inner),
                                   .weight = weight,
                                   .weight_layout = PACKED,
                                   .column_scale = weight_scale,
                                   .zero_point = zero_point,
                                   .column_sum = weight_sum,
                                   .bias = bias,
                                   .bias_dtype = bias_dtype,
                                   .activation = activation,
                                   .factor_left = left,
                                   .factor_right = right,
                                   .rank = rank,
                                   .out = out,
                                   .out_dtype = out_dtype};
    float scale = weight_sum ? input_scale : 0;
    quantize_rows(&product.left, input, input_dtype, rows, inner, NULL, scale, zero_point);
    multiply_int8(&product);
}

/* `weight` [columns, inner] in the strips of int8_tile.h. */
void pack_int8_weight(uint8_t *packed, const int8_t *weight, int64_t columns, int64_t inner)
{
#pragma omp parallel for schedule(static) if (columns * inner > SMALL)
    for (int64_t strip = 0; strip < parts_of(columns, STRIP); strip++)
        pack_by_column(packed + strip * strip_bytes(inner), weight, columns, inner, strip);
}
