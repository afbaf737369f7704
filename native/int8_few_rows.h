/* Exact products of few int8 rows with an int8 weight as it lies, [columns, inner]: the sums of int8_tile.h, each in
 * the lanes of a vector, which are added at the end. */
#ifndef MIXFT_INT8_FEW_ROWS_H
#define MIXFT_INT8_FEW_ROWS_H

#include "int8_tile.h"
#include "inline.h"

/* Up to so many rows a weight BY_COLUMN is read as it lies: packing it would take longer. Some of the rows are multiplied
 * at a time: their sums with COLUMNS fill the registers. */
#ifdef __AVX512VNNI__
enum { FEW_ROWS = 64, ROWS_AT_ONCE = 6 };
#else
enum { FEW_ROWS = TILE_ROWS, ROWS_AT_ONCE = 3 };
#endif
enum { COLUMNS = 4 };

/* How far beyond the columns that are multiplied a single pass fetches the weight, in bytes. */
#define AHEAD 4096

/* Numbers of a row in a vector. */
enum { WIDTH = LANES * DEPTH };

static inline integers weights_with_offset(const int8_t *weight)
{
    return weights_at((const uint8_t *)weight) ^ ((integers){0} + (int64_t)(OFFSET * 0x0101010101010101u));
}

static inline integers row_at(const row_value *values)
{
    integers vector;
    memcpy(&vector, values, sizeof vector);
    return vector;
}

static inline int32_t total(integers sums)
{
    int32_t lanes[LANES], all = 0;
    store_integers(lanes, sums);
    for (int lane = 0; lane < LANES; lane++)
        all += lanes[lane];
    return all;
}

/* The totals of COLUMNS. */
static inline void store_totals(int32_t *to, const integers *sums)
{
#ifdef __AVX512VNNI__
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
    __m512i wide = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
#else
    __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(sums[0], sums[1]), _mm256_unpackhi_epi32(sums[0], sums[1]));
    __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(sums[2], sums[3]), _mm256_unpackhi_epi32(sums[2], sums[3]));
    __m256i half = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
#endif
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i *)to, four);
}

/* sums [rows, STRIP] with `columns`, 1 or COLUMNS. What is `fetched` comes to the second-level cache: the first has
 * room for little more than the rows. */
INLINE void multiply_columns(int32_t *sums, const row_value *values, int64_t stride, const int8_t *weight,
                             int64_t inner, struct fetched fetched, const int rows, const int columns)
{
    integers sum[ROWS_AT_ONCE][COLUMNS], value[ROWS_AT_ONCE];
    int64_t k = 0;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int column = 0; column < columns; column++)
            sum[row][column] = (integers){0};
    for (; k + WIDTH <= inner; k += WIDTH) {
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++)
            value[row] = row_at(values + row * stride + k);
#pragma GCC unroll 4
        for (int column = 0; column < columns; column++) {
            integers weights = weights_with_offset(weight + column * inner + k);
            _mm_prefetch(fetched.ahead, _MM_HINT_T1);
            fetched.ahead += fetched.pace;
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                add_products(&sum[row][column], weights, value[row]);
        }
    }
    if (k < inner)
        /* The rows are zero beyond `inner`. */
#pragma GCC unroll 4
        for (int column = 0; column < columns; column++) {
            int8_t rest[WIDTH] = {0};
            memcpy(rest, weight + column * inner + k, inner - k);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                add_products(&sum[row][column], weights_with_offset(rest), row_at(values + row * stride + k));
        }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
        if (columns == COLUMNS)
            store_totals(sums + row * STRIP, sum[row]);
        else
            sums[row * STRIP] = total(sum[row][0]);
}

/* multiply_columns for up to STRIP of them. */
INLINE void multiply_all_columns(int32_t *sums, const row_value *values, int64_t stride, const int8_t *weight,
                                 int64_t inner, int64_t columns, struct fetched fetched, const int rows)
{
    int64_t column = 0, fetched_by_column = inner / WIDTH * fetched.pace;
    for (; column + COLUMNS <= columns; column += COLUMNS, fetched.ahead += COLUMNS * fetched_by_column)
        multiply_columns(sums + column, values, stride, weight + column * inner, inner, fetched, rows, COLUMNS);
    for (; column < columns; column++, fetched.ahead += fetched_by_column)
        multiply_columns(sums + column, values, stride, weight + column * inner, inner, fetched, rows, 1);
}

/* What the `count` rows from `first` on, of `rows`, fetch in their pass over a strip of `weight`: all rows together the
 * strip after it, or one pass the memory a little ahead of it. */
static inline struct fetched fetched_by(int64_t first, int64_t count, int64_t rows, const int8_t *weight, int64_t inner)
{
    if (count == rows)
        return (struct fetched){weight + COLUMNS * inner + AHEAD, WIDTH};
    return (struct fetched){weight + STRIP * inner + STRIP * inner * first / rows, WIDTH * count / rows};
}

/* sums [rows, STRIP] of `rows` rows, `stride` values apart, with the first `columns` of `weight`, up to STRIP. */
static inline void multiply_few_rows(int32_t *sums, const row_value *values, int64_t stride, const int8_t *weight,
                                     int64_t inner, int64_t rows, int64_t columns)
{
    int64_t parts = parts_of(rows, ROWS_AT_ONCE);
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        const row_value *from = values + first * stride;
        int32_t *to = sums + first * STRIP;
        struct fetched next = fetched_by(first, count, rows, weight, inner);
        switch (count) {
        case 1: multiply_all_columns(to, from, stride, weight, inner, columns, next, 1); break;
        case 2: multiply_all_columns(to, from, stride, weight, inner, columns, next, 2); break;
        case 3: multiply_all_columns(to, from, stride, weight, inner, columns, next, 3); break;
#ifdef __AVX512VNNI__
        case 4: multiply_all_columns(to, from, stride, weight, inner, columns, next, 4); break;
        case 5: multiply_all_columns(to, from, stride, weight, inner, columns, next, 5); break;
        case 6: multiply_all_columns(to, from, stride, weight, inner, columns, next, 6); break;
#endif
        }
    }
}

#endif
