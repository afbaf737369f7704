/* Exact products of int8 rows with a packed int8 weight, a tile at a time.
 *
 * The weight is the unsigned operand of int8_vectors.h, as w + OFFSET, and the rows q are the signed one:
 *
 *     sum_k q w = sum_k q (w + OFFSET) - OFFSET sum_k q
 *
 * in arithmetic modulo 2^32, so the result is exact wherever it fits in int32. Without VNNI the rows are kept as int16,
 * the weight is widened as it is read, and there is no offset.
 *
 * A packed weight lies in strips of STRIP of its rows; a strip holds DEPTH bytes of each of them, then the next DEPTH,
 * and anything beyond the weight's edges: the rows are zero there.
 */
#ifndef MIXFT_INT8_TILE_H
#define MIXFT_INT8_TILE_H

#include <omp.h>

#include "int8_scaling.h"
#include "inline.h"

/* Bytes of packed strips that stay in a second-level cache while the rows pass by. */
#define GROUP_BYTES (1 << 18)

/* Up to this many products a second thread costs more than it does. */
#define SMALL_PRODUCT (1 << 19)

static inline int64_t parts_of(int64_t whole, int64_t part)
{
    return (whole + part - 1) / part;
}

static inline int64_t strip_bytes(int64_t inner)
{
    return STRIP * DEPTH * parts_of(inner, DEPTH);
}

/* What is asked for while a product runs: `pace` bytes of memory from `ahead` on at every step. */
struct fetched {
    const int8_t *ahead;
    int64_t pace;
};

/* What a tile gives: its sums [rows, STRIP], or where `scaling` is not NULL the floats that they become. */
struct tile_result {
    int32_t *sums;
    const struct scaling *scaling;
};

/* The result of `rows` rows, `stride` values apart, with a strip of the weight. */
INLINE void multiply_rows(struct tile_result result, const row_value *values, int64_t stride, const uint8_t *strip,
                          int64_t steps, struct fetched fetched, const int rows)
{
    integers sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        sum[row][0] = sum[row][1] = (integers){0};
    for (int64_t step = 0; step < steps; step++) {
        integers left = weights_at(strip), right = weights_at(strip + LANES * DEPTH);
        _mm_prefetch(fetched.ahead, _MM_HINT_T0);
        fetched.ahead += fetched.pace;
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            integers all = values_at(values + row * stride);
            add_products(&sum[row][0], left, all);
            add_products(&sum[row][1], right, all);
        }
        values += DEPTH;
        strip += STRIP * DEPTH;
    }
    if (result.scaling) {
        struct column_vectors columns = vectors_of(result.scaling->columns);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
            scale_row(result.scaling, &columns, row, sum[row][0], sum[row][1]);
        return;
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store_integers(result.sums + row * STRIP, sum[row][0]);
        store_integers(result.sums + row * STRIP + LANES, sum[row][1]);
    }
}

/* multiply_rows for 1 to TILE_ROWS rows, each number of them compiled by itself. */
static inline void multiply_tile(struct tile_result result, const row_value *values, int64_t stride,
                                 const uint8_t *strip, int64_t inner, int64_t rows, struct fetched fetched)
{
    int64_t steps = parts_of(inner, DEPTH);
    switch (rows) {
    case 1: multiply_rows(result, values, stride, strip, steps, fetched, 1); break;
    case 2: multiply_rows(result, values, stride, strip, steps, fetched, 2); break;
    case 3: multiply_rows(result, values, stride, strip, steps, fetched, 3); break;
    case 4: multiply_rows(result, values, stride, strip, steps, fetched, 4); break;
    case 5: multiply_rows(result, values, stride, strip, steps, fetched, 5); break;
#if TILE_ROWS > 6
    case 6: multiply_rows(result, values, stride, strip, steps, fetched, 6); break;
    case 7: multiply_rows(result, values, stride, strip, steps, fetched, 7); break;
    case 8: multiply_rows(result, values, stride, strip, steps, fetched, 8); break;
    case 9: multiply_rows(result, values, stride, strip, steps, fetched, 9); break;
    case 10: multiply_rows(result, values, stride, strip, steps, fetched, 10); break;
    case 11: multiply_rows(result, values, stride, strip, steps, fetched, 11); break;
#endif
    default: multiply_rows(result, values, stride, strip, steps, fetched, TILE_ROWS);
    }
}

/* Does the tile of `rows` rows from `row` on with strip number `strip`, which is number `place` of its group. */
typedef void tile_function(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place);

/* Makes the strips from `begin` up to `end`, a group, ready for the tiles of the calling thread. */
typedef void group_function(const void *arguments, int64_t begin, int64_t end);

/* Every tile of [rows, columns] once. A thread takes neighbouring strips, of which it passes all its rows by a `group`
 * before it goes on, and a band of the rows where there are more threads than strips. */
INLINE void for_each_tile(int64_t rows, int64_t inner, int64_t columns, int64_t group, group_function prepare,
                          tile_function body, const void *arguments)
{
    int64_t strips = parts_of(columns, STRIP), tiles = parts_of(rows, TILE_ROWS);
#pragma omp parallel if (rows * inner * columns > SMALL_PRODUCT)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t across = threads < strips ? threads : strips, bands = threads / across;
        int64_t part = thread % across, band = thread / across;
        int64_t last = band < bands ? strips * (part + 1) / across : 0;
        for (int64_t begin = strips * part / across; begin < last; begin += group) {
            int64_t end = begin + group < last ? begin + group : last;
            prepare(arguments, begin, end);
            for (int64_t tile = tiles * band / bands; tile < tiles * (band + 1) / bands; tile++) {
                int64_t row = rows * tile / tiles, next = rows * (tile + 1) / tiles;
                for (int64_t strip = begin; strip < end; strip++)
                    body(arguments, row, next - row, strip, strip - begin);
            }
        }
    }
}

#endif
