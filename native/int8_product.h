/* A product of int8 rows and an int8 weight, and all that follows it, from its operands to its output.
 *
 *     out = act(row_scale column_scale (sum_k q w - zero_point column_sum) + bias + left right)
 *
 * with rows q [rows, inner], sums in int32 and the rest in FP32. A weight that is not packed ahead is packed by each
 * thread as far as it is about to multiply with it, so that no second copy is kept.
 */
#ifndef MIXFT_INT8_PRODUCT_H
#define MIXFT_INT8_PRODUCT_H

#include "activation.h"
#include "int8_rows.h"

enum { PACKED, BY_COLUMN, BY_ROW };

struct int8_product {
    int64_t rows, inner, columns;
    struct quantized_rows left;
    const void *weight;
    int weight_layout;          /* PACKED, or int8: BY_COLUMN [columns, inner], BY_ROW [inner, columns] */
    uint8_t *groups;            /* room for one group of strips a thread, unless PACKED */
    const float *column_scale;  /* [columns], or NULL for 1 */
    const int32_t *column_sum;  /* [columns], or NULL: no zero points */
    int32_t zero_point;         /* of every row */
    const int32_t *zero_points; /* [rows], beside that one, or NULL */
    const void *bias;           /* [columns], or NULL */
    const float *factor_left;   /* [rows, rank] */
    const float *factor_right;  /* [rank, columns] */
    int64_t rank;
    void *out; /* [rows, columns] */
    int bias_dtype, activation, out_dtype;
};

static inline uint8_t *group_of_thread(const struct int8_product *to)
{
    return to->groups + omp_get_thread_num() * strips_of_group(to->inner) * strip_bytes(to->inner);
}

/* One depth of a strip of a weight BY_ROW: DEPTH of its rows, the bytes of their columns side by side. */
static inline void interleave(uint8_t *restrict out, const int8_t *restrict rows, int64_t stride)
{
    for (int column = 0; column < STRIP; column++)
        for (int row = 0; row < DEPTH; row++)
            out[column * DEPTH + row] = (uint8_t)rows[row * stride + column] ^ OFFSET;
}

static inline void pack_by_row(uint8_t *out, const struct int8_product *to, int64_t begin, int64_t end)
{
    int64_t bytes = strip_bytes(to->inner);
    /* Strips within, so that the lines of the weight are read whole. */
    for (int64_t row = 0; row < to->inner; row += DEPTH)
        for (int64_t strip = begin; strip < end; strip++) {
            int64_t column = strip * STRIP, width = least(to->columns - column, STRIP);
            int64_t height = least(to->inner - row, DEPTH);
            const int8_t *from = (const int8_t *)to->weight + row * to->columns + column;
            uint8_t *target = out + (strip - begin) * bytes + row * STRIP;
            int8_t edge[DEPTH * STRIP] = {0};
            if (width == STRIP && height == DEPTH) {
                interleave(target, from, to->columns);
            } else {
                for (int64_t i = 0; i < height; i++)
                    memcpy(edge + i * STRIP, from + i * to->columns, width);
                interleave(target, edge, STRIP);
            }
        }
}

/* `count` bytes, up to DEPTH, each as w + OFFSET. */
static inline depth_bytes with_offset(const int8_t *from, int64_t count)
{
    depth_bytes bytes = 0;
    memcpy(&bytes, from, count);
    return bytes ^ OFFSETS;
}

/* A strip of `weight` [columns, inner]. */
static inline void pack_by_column(void *strip_of, const int8_t *weight, int64_t columns, int64_t inner, int64_t strip)
{
    depth_bytes *out = strip_of;
    int64_t whole = inner / DEPTH;
    for (int64_t column = strip * STRIP; column < least(columns, (strip + 1) * STRIP); column++, out++) {
        const int8_t *row = weight + column * inner;
        for (int64_t step = 0; step < whole; step++)
            out[step * STRIP] = with_offset(row + step * DEPTH, DEPTH);
        if (inner % DEPTH)
            out[whole * STRIP] = with_offset(row + whole * DEPTH, inner % DEPTH);
    }
}

static void pack_group(const void *arguments, int64_t begin, int64_t end)
{
    const struct int8_product *to = arguments;
    uint8_t *out = group_of_thread(to);
    if (to->weight_layout == BY_ROW)
        pack_by_row(out, to, begin, end);
    else
        for (int64_t strip = begin; strip < end; strip++)
            pack_by_column(out + (strip - begin) * strip_bytes(to->inner), to->weight, to->columns, to->inner, strip);
}

/* What the columns of a strip bring along, with anything beyond the last. */
struct strip_columns {
    _Alignas(64) float scale[STRIP], bias[STRIP];
    int32_t sum[STRIP], excess[STRIP];
    int64_t first, count;
};

static inline void read_columns(struct strip_columns *to, const struct int8_product *from, int64_t strip)
{
    int64_t first = strip * STRIP, count = least(from->columns - first, STRIP);
    *to = (struct strip_columns){.first = first, .count = count};
    if (from->column_scale)
        memcpy(to->scale, from->column_scale + first, count * sizeof(float));
    else
        for (int i = 0; i < STRIP; i++)
            to->scale[i] = 1;
    if (from->column_sum)
        memcpy(to->sum, from->column_sum + first, count * sizeof(int32_t));
    for (int i = 0; i < STRIP; i++)
        to->excess[i] = (uint32_t)from->zero_point * to->sum[i];
    if (from->bias)
        load_floats(to->bias, element(from->bias, first, from->bias_dtype), count, from->bias_dtype);
}

static inline floats multiply_add(float a, const float *b, floats c)
{
#ifdef __AVX512VNNI__
    return _mm512_fmadd_ps(_mm512_set1_ps(a), _mm512_loadu_ps(b), c);
#else
    return _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(b), c);
#endif
}

/* y += left right for one row and the columns of a strip. */
static inline void add_factors(float *y, const struct int8_product *from, int64_t row,
                               const struct strip_columns *columns)
{
    const float *left = from->factor_left + row * from->rank, *right = from->factor_right + columns->first;
    if (columns->count == STRIP) {
        floats low, high;
        memcpy(&low, y, sizeof low);
        memcpy(&high, y + LANES, sizeof high);
        for (int64_t k = 0; k < from->rank; k++, right += from->columns) {
            low = multiply_add(left[k], right, low);
            high = multiply_add(left[k], right + LANES, high);
        }
        memcpy(y, &low, sizeof low);
        memcpy(y + LANES, &high, sizeof high);
    } else {
        for (int64_t k = 0; k < from->rank; k++, right += from->columns)
            for (int64_t i = 0; i < columns->count; i++)
                y[i] = __builtin_fmaf(left[k], right[i], y[i]);
    }
}

static void do_tile(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place)
{
    const struct int8_product *to = arguments;
    const uint8_t *packed = to->weight_layout == PACKED ? to->weight : group_of_thread(to);
    int32_t sums[TILE_ROWS * STRIP];
    struct strip_columns columns;
    read_columns(&columns, to, strip);
    multiply_tile(sums, to->left.values + row * to->left.stride, to->left.stride,
                  packed + (to->weight_layout == PACKED ? strip : place) * strip_bytes(to->inner), to->inner, rows);
    int whole = columns.count == STRIP, dtype = to->out_dtype;
    for (int32_t *sum = sums; rows > 0; rows--, row++, sum += STRIP) {
        void *out = element(to->out, row * to->columns + columns.first, dtype);
        float wide[STRIP], *restrict y = whole && dtype == FLOAT32 ? out : wide, row_scale = to->left.scale[row];
        int32_t excess = to->left.sum[row];
        if (to->zero_points)
            for (int i = 0; i < STRIP; i++)
                sum[i] -= (uint32_t)to->zero_points[row] * columns.sum[i];
        for (int i = 0; i < STRIP; i++) {
            int32_t exact = (uint32_t)sum[i] - excess - columns.excess[i];
            y[i] = __builtin_fmaf(exact * columns.scale[i], row_scale, columns.bias[i]);
        }
        if (to->rank)
            add_factors(y, to, row, &columns);
        activate(y, STRIP, to->activation);
        /* A length that the compiler knows leaves no loop to be counted. */
        if (whole && dtype != FLOAT32)
            store_floats(out, y, STRIP, dtype);
        else if (!whole)
            store_floats(out, y, columns.count, dtype);
    }
}

static inline void multiply_int8(const struct int8_product *product)
{
    group_function *prepare = product->weight_layout == PACKED ? NULL : pack_group;
    for_each_tile(product->rows, product->inner, product->columns, prepare, do_tile, product);
}

#endif
