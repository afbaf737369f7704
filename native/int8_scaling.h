/* From the exact sums of a strip of a product to floats. */
#ifndef MIXFT_INT8_SCALING_H
#define MIXFT_INT8_SCALING_H

#include "int8_vectors.h"
#include "inline.h"

enum { STRIP = 2 * LANES };

/* What the columns of a strip bring along, with anything beyond the last. */
struct strip_columns {
    _Alignas(64) float scale[STRIP], bias[STRIP];
    int32_t sum[STRIP], excess[STRIP];
    int64_t first, count;
};

/* y [STRIP] of a row, and of those after it, `stride` apart: row_scale scale (sum - row_excess - excess) + bias. */
struct scaling {
    const struct strip_columns *columns;
    const float *row_scale;
    const int32_t *row_excess;
    float *y;
    int64_t stride;
};

/* The columns' part of it in registers. */
struct column_vectors {
    integers excess[2];
    floats scale[2], bias[2];
};

static inline struct column_vectors vectors_of(const struct strip_columns *columns)
{
    struct column_vectors vectors;
    for (int half = 0; half < 2; half++) {
        vectors.excess[half] = load_integers(columns->excess + half * LANES);
        vectors.scale[half] = load_vector(columns->scale + half * LANES);
        vectors.bias[half] = load_vector(columns->bias + half * LANES);
    }
    return vectors;
}

/* Row number `row`, whose sums are `left` and `right`. */
INLINE void scale_row(const struct scaling *to, const struct column_vectors *columns, int64_t row, integers left,
                      integers right)
{
    float *y = to->y + row * to->stride, row_scale = to->row_scale[row];
    floats low = difference(left, columns->excess[0], to->row_excess[row]) * columns->scale[0];
    floats high = difference(right, columns->excess[1], to->row_excess[row]) * columns->scale[1];
    store_vector(y, multiply_add(low, row_scale, columns->bias[0]));
    store_vector(y + LANES, multiply_add(high, row_scale, columns->bias[1]));
}

/* `rows` rows, from sums [rows, STRIP] in memory. */
static inline void scale_rows(const struct scaling *to, const int32_t *sums, int64_t rows)
{
    struct column_vectors columns = vectors_of(to->columns);
    for (int64_t row = 0; row < rows; row++, sums += STRIP)
        scale_row(to, &columns, row, load_integers(sums), load_integers(sums + LANES));
}

#endif
