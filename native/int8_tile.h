/* Exact products of int8 rows with a packed int8 weight, a tile at a time, by AVX512-VNNI.
 *
 * The instruction multiplies four unsigned bytes by four signed ones and adds the products in int32. The weight is the
 * unsigned operand, as w + 128, and the rows q are the signed one:
 *
 *     sum_k q w = sum_k q (w + 128) - 128 sum_k q
 *
 * in arithmetic modulo 2^32, so the result is exact wherever it fits in int32. A packed weight lies in strips of STRIP
 * of its rows; a strip holds QUAD bytes of each of them, then the next QUAD, and zeros beyond the weight's edges.
 */
#ifndef MIXFT_INT8_TILE_H
#define MIXFT_INT8_TILE_H

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* The sums of a tile fill 24 of the 32 registers. */
enum { TILE_ROWS = 12, STRIP = 32, QUAD = 4, LANES = 16 };

/* Bytes of the weight that stay in a second-level cache while the rows pass by. */
#define GROUP_BYTES (1 << 18)

/* How far ahead the weight is fetched from memory, in bytes. */
#define AHEAD 4096

/* Up to this many products a second thread costs more than it does. */
#define SMALL_PRODUCT (1 << 19)

static inline int64_t parts_of(int64_t whole, int64_t part)
{
    return (whole + part - 1) / part;
}

static inline int64_t strip_bytes(int64_t inner)
{
    return STRIP * QUAD * parts_of(inner, QUAD);
}

/* Adds the products of four bytes in each lane. The compiler's intrinsic makes it copy the sums around. */
static inline void add_products(__m512i *sum, __m512i weight, __m512i values)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(weight), "v"(values));
}

/* sums [rows, STRIP] of `rows` rows of int8, `stride` bytes apart, with a strip of the weight. */
static inline __attribute__((always_inline)) void multiply_rows(int32_t *sums, const int8_t *values, int64_t stride,
                                                                const uint8_t *strip, int64_t quads, const int rows)
{
    __m512i sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        sum[row][0] = sum[row][1] = _mm512_setzero_si512();
    for (int64_t quad = 0; quad < quads; quad++) {
        __m512i left = _mm512_loadu_si512(strip), right = _mm512_loadu_si512(strip + 64);
        _mm_prefetch(strip + AHEAD, _MM_HINT_T0);
        _mm_prefetch(strip + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, values + row * stride, QUAD);
            add_products(&sum[row][0], left, _mm512_set1_epi32(four));
            add_products(&sum[row][1], right, _mm512_set1_epi32(four));
        }
        values += QUAD;
        strip += STRIP * QUAD;
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        _mm512_storeu_si512(sums + row * STRIP, sum[row][0]);
        _mm512_storeu_si512(sums + row * STRIP + LANES, sum[row][1]);
    }
}

/* multiply_rows for 1 to TILE_ROWS rows, each number of them compiled by itself. */
static inline void multiply_tile(int32_t *sums, const int8_t *values, int64_t stride, const uint8_t *strip,
                                 int64_t inner, int64_t rows)
{
    int64_t quads = parts_of(inner, QUAD);
    switch (rows) {
    case 1: multiply_rows(sums, values, stride, strip, quads, 1); break;
    case 2: multiply_rows(sums, values, stride, strip, quads, 2); break;
    case 3: multiply_rows(sums, values, stride, strip, quads, 3); break;
    case 4: multiply_rows(sums, values, stride, strip, quads, 4); break;
    case 5: multiply_rows(sums, values, stride, strip, quads, 5); break;
    case 6: multiply_rows(sums, values, stride, strip, quads, 6); break;
    case 7: multiply_rows(sums, values, stride, strip, quads, 7); break;
    case 8: multiply_rows(sums, values, stride, strip, quads, 8); break;
    case 9: multiply_rows(sums, values, stride, strip, quads, 9); break;
    case 10: multiply_rows(sums, values, stride, strip, quads, 10); break;
    case 11: multiply_rows(sums, values, stride, strip, quads, 11); break;
    default: multiply_rows(sums, values, stride, strip, quads, 12);
    }
}

/* Does the tile of `rows` rows from `row` on with strip number `strip`, which is number `place` of its group. */
typedef void tile_function(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place);

/* Makes the strips from `begin` up to `end`, a group, ready for the tiles of the calling thread. */
typedef void group_function(const void *arguments, int64_t begin, int64_t end);

/* Strips that a thread passes all its rows by before it goes on: as many as stay in the cache, or one. */
static inline int64_t strips_of_group(int64_t inner)
{
    return 1 + GROUP_BYTES / strip_bytes(inner);
}

/* Every tile of [rows, columns] once. A thread takes neighbouring strips, and a band of the rows where there are more
 * threads than strips. `prepare` is NULL where the strips are ready. */
static inline __attribute__((always_inline)) void for_each_tile(int64_t rows, int64_t inner, int64_t columns,
                                                                group_function prepare, tile_function body,
                                                                const void *arguments)
{
    int64_t strips = parts_of(columns, STRIP), tiles = parts_of(rows, TILE_ROWS);
    int64_t group = strips_of_group(inner);
#pragma omp parallel if (rows * inner * columns > SMALL_PRODUCT)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t across = threads < strips ? threads : strips, bands = threads / across;
        int64_t part = thread % across, band = thread / across;
        int64_t last = band < bands ? strips * (part + 1) / across : 0;
        for (int64_t begin = strips * part / across; begin < last; begin += group) {
            int64_t end = begin + group < last ? begin + group : last;
            if (prepare)
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
