/* Exact products of int8 rows with a packed int8 weight, a tile at a time.
 *
 * VNNI multiplies four unsigned bytes by four signed ones and adds the products in int32. The weight is the unsigned
 * operand, as w + OFFSET, and the rows q are the signed one:
 *
 *     sum_k q w = sum_k q (w + OFFSET) - OFFSET sum_k q
 *
 * in arithmetic modulo 2^32, so the result is exact wherever it fits in int32. Without VNNI, AVX2 multiplies pairs of
 * int16: the rows are kept that wide, the weight is widened as it is read, and there is no offset. (Its products of
 * bytes would saturate.)
 *
 * A packed weight lies in strips of STRIP of its rows; a strip holds DEPTH bytes of each of them, then the next DEPTH,
 * and anything beyond the weight's edges: the rows are zero there.
 */
#ifndef MIXFT_INT8_TILE_H
#define MIXFT_INT8_TILE_H

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Two vectors of sums a row and two of the weight fill the registers. */
#ifdef __AVX512VNNI__
#define TILE_ROWS 12
enum { LANES = 16 };
typedef __m512i integers;
typedef __m512 floats;
#else
#define TILE_ROWS 6
enum { LANES = 8 };
typedef __m256i integers;
typedef __m256 floats;
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
enum { DEPTH = 4, OFFSET = 128 };
typedef int8_t row_value;
typedef uint32_t depth_bytes;
#define OFFSETS 0x80808080u
#else
enum { DEPTH = 2, OFFSET = 0 };
typedef int16_t row_value;
typedef uint16_t depth_bytes;
#define OFFSETS 0u
#endif

enum { STRIP = 2 * LANES };

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

/* Half a strip at one depth, and one row's values at it for every lane. */
#ifdef __AVX512VNNI__
static inline integers weights_at(const uint8_t *strip)
{
    return _mm512_loadu_si512(strip);
}

static inline integers values_at(const row_value *values)
{
    int32_t all;
    memcpy(&all, values, 4);
    return _mm512_set1_epi32(all);
}

static inline void store_integers(int32_t *to, integers from)
{
    _mm512_storeu_si512(to, from);
}

/* The compiler's intrinsic makes it copy the sums around. */
static inline void add_products(integers *sum, integers weights, integers values)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(weights), "v"(values));
}
#else
static inline integers weights_at(const uint8_t *strip)
{
#ifdef __AVXVNNI__
    return _mm256_loadu_si256((const __m256i *)strip);
#else
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)strip));
#endif
}

static inline integers values_at(const row_value *values)
{
    int32_t all;
    memcpy(&all, values, 4);
    return _mm256_set1_epi32(all);
}

static inline void store_integers(int32_t *to, integers from)
{
    _mm256_storeu_si256((__m256i *)to, from);
}

static inline void add_products(integers *sum, integers weights, integers values)
{
#ifdef __AVXVNNI__
    *sum = _mm256_dpbusd_avx_epi32(*sum, weights, values);
#else
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, values));
#endif
}
#endif

/* What a tile asks for while it multiplies: `pace` bytes of memory from `ahead` on at every depth. */
struct fetched {
    const int8_t *ahead;
    int64_t pace;
};

/* sums [rows, STRIP] of `rows` rows, `stride` values apart, with a strip of the weight. */
static inline __attribute__((always_inline)) void multiply_rows(int32_t *sums, const row_value *values, int64_t stride,
                                                                const uint8_t *strip, int64_t steps,
                                                                struct fetched fetched, const int rows)
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
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store_integers(sums + row * STRIP, sum[row][0]);
        store_integers(sums + row * STRIP + LANES, sum[row][1]);
    }
}

/* multiply_rows for 1 to TILE_ROWS rows, each number of them compiled by itself. */
static inline void multiply_tile(int32_t *sums, const row_value *values, int64_t stride, const uint8_t *strip,
                                 int64_t inner, int64_t rows, struct fetched fetched)
{
    int64_t steps = parts_of(inner, DEPTH);
    switch (rows) {
    case 1: multiply_rows(sums, values, stride, strip, steps, fetched, 1); break;
    case 2: multiply_rows(sums, values, stride, strip, steps, fetched, 2); break;
    case 3: multiply_rows(sums, values, stride, strip, steps, fetched, 3); break;
    case 4: multiply_rows(sums, values, stride, strip, steps, fetched, 4); break;
    case 5: multiply_rows(sums, values, stride, strip, steps, fetched, 5); break;
#if TILE_ROWS > 6
    case 6: multiply_rows(sums, values, stride, strip, steps, fetched, 6); break;
    case 7: multiply_rows(sums, values, stride, strip, steps, fetched, 7); break;
    case 8: multiply_rows(sums, values, stride, strip, steps, fetched, 8); break;
    case 9: multiply_rows(sums, values, stride, strip, steps, fetched, 9); break;
    case 10: multiply_rows(sums, values, stride, strip, steps, fetched, 10); break;
    case 11: multiply_rows(sums, values, stride, strip, steps, fetched, 11); break;
#endif
    default: multiply_rows(sums, values, stride, strip, steps, fetched, TILE_ROWS);
    }
}

/* Does the tile of `rows` rows from `row` on with strip number `strip`, which is number `place` of its group. */
typedef void tile_function(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place);

/* Makes the strips from `begin` up to `end`, a group, ready for the tiles of the calling thread. */
typedef void group_function(const void *arguments, int64_t begin, int64_t end);

/* Every tile of [rows, columns] once. A thread takes neighbouring strips, of which it passes all its rows by a `group`
 * before it goes on, and a band of the rows where there are more threads than strips. */
static inline __attribute__((always_inline)) void for_each_tile(int64_t rows, int64_t inner, int64_t columns,
                                                                int64_t group, group_function prepare,
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
