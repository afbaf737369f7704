/* A product of int8 rows and an int8 weight, and all that follows it, from its operands to its output.
 *
 *     out = act(row_scale column_scale (sum_k q w - zero_point column_sum) + bias + left right)
 *
 * with rows q [rows, inner], sums in int32 and the rest in FP32. No second copy of the weight is kept: each thread
 * packs the part that it is about to multiply with, while the part after that is on its way from memory.
 */
#ifndef MIXFT_INT8_PRODUCT_H
#define MIXFT_INT8_PRODUCT_H

#include "activation.h"
#include "int8_few_rows.h"
#include "int8_pack.h"
#include "int8_rows.h"

enum { BY_COLUMN, BY_ROW };
enum { LIMBS = 3 };

/* What a product of floats adds: left [rows, rank] times right [rank, columns]. */
struct low_rank {
    const float *left, *right;
    int64_t rank;
};

struct int8_product {
    int64_t rows, inner, columns;
    int limbs;                  /* of a row: 1, or LIMBS, each a 256th of the one before */
    struct quantized_rows left; /* all first limbs, then the others */
    const int8_t *weight;
    int weight_layout;          /* BY_COLUMN [columns, inner], or BY_ROW [inner, columns] */
    uint8_t *groups;            /* room for one group of strips a thread */
    const float *column_scale;  /* [columns], or NULL for 1 */
    const int32_t *column_sum;  /* [columns], or NULL: no zero points */
    int32_t zero_point;         /* of every row */
    const int32_t *zero_points; /* [rows], beside that one, or NULL */
    const void *bias;           /* [columns], or NULL */
    struct low_rank added;
    void *out; /* [rows, columns] */
    int bias_dtype, activation, out_dtype;
};

/* The product of `limbs` times `rows` rows with `weight`, which lies as `layout` says, and nothing after it as yet.
 * `groups` has room for a group of strips a thread, `scratch` for the rows of int8_rows.h. */
static inline struct int8_product int8_product_of(int64_t rows, int64_t inner, int64_t columns, int limbs,
                                                  const int8_t *weight, int layout, uint8_t *groups, void *scratch)
{
    return (struct int8_product){.rows = rows,
                                 .inner = inner,
                                 .columns = columns,
                                 .limbs = limbs,
                                 .left = rows_at(scratch, limbs * rows, inner),
                                 .weight = weight,
                                 .weight_layout = layout,
                                 .groups = groups,
                                 .activation = NONE};
}

static inline int is_read_in_place(const struct int8_product *product)
{
    return product->weight_layout == BY_COLUMN && product->limbs * product->rows <= FEW_ROWS;
}

/* Strips packed at a time: of a weight BY_ROW as many as stay in the cache, since a line of it is of two or more. */
static inline int64_t strips_of_group(const struct int8_product *product)
{
    return product->weight_layout == BY_ROW ? 1 + GROUP_BYTES / strip_bytes(product->inner) : 1;
}

static inline uint8_t *group_of_thread(const struct int8_product *product)
{
    return product->groups + omp_get_thread_num() * strips_of_group(product) * strip_bytes(product->inner);
}

static void pack_group(const void *arguments, int64_t begin, int64_t end)
{
    const struct int8_product *product = arguments;
    if (product->weight_layout == BY_ROW)
        pack_by_row(group_of_thread(product), product->weight, product->columns, product->inner, begin, end);
    else if (!is_read_in_place(product))
        pack_by_column(group_of_thread(product), product->weight, product->columns, product->inner, begin);
}

/* Of the strip that a weight BY_COLUMN has packed next, what falls to `rows` rows from `row` on. */
static inline struct fetched next_bytes(const struct int8_product *product, int64_t row, int64_t rows, int64_t strip)
{
    int64_t bytes = STRIP * product->inner;
    const int8_t *next = product->weight + (strip + 1) * bytes;
    if (product->weight_layout == BY_ROW)
        return (struct fetched){product->weight, 0};
    return (struct fetched){next + bytes * row / product->rows, STRIP * DEPTH * rows / product->rows};
}

/* The result of a limb of the rows from `row` on with strip number `strip`, number `place` of its group. */
static inline void multiply_strip(struct tile_result result, const struct int8_product *product, int limb, int64_t row,
                                  int64_t rows, int64_t strip, int64_t place)
{
    int64_t inner = product->inner, stride = product->left.stride, first = strip * STRIP;
    const row_value *values = product->left.values + (limb * product->rows + row) * stride;
    if (is_read_in_place(product))
        multiply_few_rows(result.sums, values, stride, product->weight + first * inner, inner, rows,
                          least(product->columns - first, STRIP));
    else
        multiply_tile(result, values, stride, group_of_thread(product) + place * strip_bytes(inner), inner, rows,
                      next_bytes(product, row, rows, strip));
}

static inline void read_columns(struct strip_columns *columns, const struct int8_product *product, int64_t strip)
{
    int64_t first = strip * STRIP, count = least(product->columns - first, STRIP);
    *columns = (struct strip_columns){.first = first, .count = count};
    if (product->column_scale)
        memcpy(columns->scale, product->column_scale + first, count * sizeof(float));
    else
        for (int i = 0; i < STRIP; i++)
            columns->scale[i] = 1;
    if (product->column_sum)
        memcpy(columns->sum, product->column_sum + first, count * sizeof(int32_t));
    for (int i = 0; i < STRIP; i++)
        columns->excess[i] = (uint32_t)product->zero_point * columns->sum[i];
    if (product->bias)
        load_floats(columns->bias, element(product->bias, first, product->bias_dtype), count, product->bias_dtype);
}

/* y += left right for one row and the columns of a strip. */
static inline void add_factors(float *y, const struct int8_product *product, int64_t row,
                               const struct strip_columns *columns)
{
    int64_t rank = product->added.rank;
    const float *left = product->added.left + row * rank, *right = product->added.right + columns->first;
    if (columns->count == STRIP) {
        floats low = load_vector(y), high = load_vector(y + LANES);
        for (int64_t k = 0; k < rank; k++, right += product->columns) {
            low = multiply_add(load_vector(right), left[k], low);
            high = multiply_add(load_vector(right + LANES), left[k], high);
        }
        store_vector(y, low);
        store_vector(y + LANES, high);
    } else {
        for (int64_t k = 0; k < rank; k++, right += product->columns)
            for (int64_t i = 0; i < columns->count; i++)
                y[i] = __builtin_fmaf(left[k], right[i], y[i]);
    }
}

/* sums [rows, STRIP] -= zero_points column_sum, of the rows from `row` on. */
static inline void subtract_zero_points(int32_t *restrict sums, const struct int8_product *product, int64_t row,
                                        int64_t rows, const struct strip_columns *columns)
{
    for (int64_t place = 0; place < rows; place++, sums += STRIP)
        for (int i = 0; i < STRIP; i++)
            sums[i] -= (uint32_t)product->zero_points[row + place] * columns->sum[i];
}

/* y from the exact sums of all limbs of the rows from `row` on. */
static inline void combine_limbs(const struct scaling *to, int32_t sums[LIMBS][TILE_ROWS * STRIP],
                                 const struct int8_product *product, int64_t row, int64_t rows)
{
    const struct strip_columns *columns = to->columns;
    float *restrict y = to->y;
    for (int64_t place = 0; place < rows; place++, row++, y += to->stride) {
        float total[STRIP] = {0}, part = 1;
        for (int limb = 0; limb < product->limbs; limb++, part /= 256) {
            int32_t excess = product->left.sum[limb * product->rows + row], *sum = sums[limb] + place * STRIP;
            for (int i = 0; i < STRIP; i++)
                total[i] += part * (int32_t)((uint32_t)sum[i] - excess);
        }
        for (int i = 0; i < STRIP; i++)
            y[i] = __builtin_fmaf(total[i] * columns->scale[i], product->left.scale[row], columns->bias[i]);
    }
}

/* Asks for the memory that rows of STRIP results go to, so that it is at hand when they are known. */
static inline void fetch_results(const char *out, int64_t rows, int64_t stride, int64_t bytes)
{
    for (int64_t row = 0; row < rows; row++, out += stride) {
        _mm_prefetch(out, _MM_HINT_T0);
        _mm_prefetch(out + bytes - 1, _MM_HINT_T0);
    }
}

/* The scaled sums of `rows` rows from `row` on with a strip, which is number `place` of its group. */
static inline void multiply_and_scale(const struct scaling *to, const struct int8_product *product, int64_t row,
                                      int64_t rows, int64_t strip, int64_t place)
{
    int32_t sums[LIMBS][TILE_ROWS * STRIP];
    int in_registers = product->limbs == 1 && !product->zero_points && !is_read_in_place(product);
    for (int limb = 0; limb < product->limbs; limb++) {
        struct tile_result result = {sums[limb], in_registers ? to : NULL};
        multiply_strip(result, product, limb, row, rows, strip, place);
    }
    if (product->zero_points)
        subtract_zero_points(sums[0], product, row, rows, to->columns);
    if (product->limbs > 1)
        combine_limbs(to, sums, product, row, rows);
    else if (!in_registers)
        scale_rows(to, sums[0], rows);
}

static void do_tile(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place)
{
    const struct int8_product *product = arguments;
    float wide[TILE_ROWS * STRIP];
    struct strip_columns columns;
    read_columns(&columns, product, strip);
    int whole = columns.count == STRIP, dtype = product->out_dtype, direct = whole && dtype == FLOAT32;
    char *out = element(product->out, row * product->columns + columns.first, dtype);
    int64_t bytes = bytes_of(dtype), stride = direct ? product->columns : STRIP;
    float *y = direct ? (float *)out : wide;
    struct scaling scaling = {&columns, product->left.scale + row, product->left.sum + row, y, stride};
    if (!is_read_in_place(product))
        fetch_results(out, rows, product->columns * bytes, STRIP * bytes);
    multiply_and_scale(&scaling, product, row, rows, strip, place);
    if (direct && !product->added.rank && product->activation == NONE)
        return;
    for (int64_t i = 0; i < rows; i++, y += stride, out += product->columns * bytes) {
        if (product->added.rank)
            add_factors(y, product, row + i, &columns);
        activate(y, STRIP, product->activation);
        /* A length that the compiler knows leaves no loop to be counted. */
        if (whole && !direct)
            store_floats(out, y, STRIP, dtype);
        else if (!whole)
            store_floats(out, y, columns.count, dtype);
    }
}

static inline void multiply_int8(const struct int8_product *product)
{
    for_each_tile(product->rows, product->inner, product->columns, strips_of_group(product), pack_group, do_tile,
                  product);
}

#endif
