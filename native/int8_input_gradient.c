/* The gradient of a layer's input through its int8 weight, as one product of bytes: mixft/cpu/int8_input_gradient.py.
 *
 * The product sums along the weight's rows, which lie across the order that int8_tile.h packs. Each thread packs what
 * it is about to multiply with from the weight itself, so that no second copy is kept.
 *
 * Compiled for AVX512-VNNI in every build; only processors that have it get here.
 */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "int8_rows.h"

struct gradient {
    const int8_t *weight; /* [inner, columns] */
    int64_t inner, columns;
    void *out;
    int dtype;
    struct low_rank added;
    struct quantized_rows quantized;
    uint8_t *groups; /* room for one group of strips a thread */
};

static inline uint8_t *group_of_thread(const struct gradient *to)
{
    return to->groups + omp_get_thread_num() * strips_of_group(to->inner) * strip_bytes(to->inner);
}

/* The bytes of a strip's columns in one row of the weight as unsigned ones, w + 128. */
static inline __m256i unsigned_row(const struct gradient *to, int64_t row, int64_t column)
{
    int64_t count = least(to->columns - column, STRIP);
    __mmask32 valid = row < to->inner ? (__mmask32)(0xFFFFFFFFull >> (STRIP - count)) : 0;
    const int8_t *from = to->weight + row * to->columns + column;
    return _mm256_xor_si256(_mm256_maskz_loadu_epi8(valid, from), _mm256_set1_epi8(-128));
}

/* One quad of a strip: four rows of the weight with their bytes interleaved. */
static inline void pack_quad(uint8_t *out, const struct gradient *to, int64_t row, int64_t column)
{
    __m256i a = unsigned_row(to, row, column), b = unsigned_row(to, row + 1, column);
    __m256i c = unsigned_row(to, row + 2, column), d = unsigned_row(to, row + 3, column);
    __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    __m256i high_ab = _mm256_unpackhi_epi8(a, b), high_cd = _mm256_unpackhi_epi8(c, d);
    /* Columns 0 to 3 and 16 to 19, then 4 to 7 and 20 to 23, and so on. */
    __m256i first = _mm256_unpacklo_epi16(ab, cd), second = _mm256_unpackhi_epi16(ab, cd);
    __m256i third = _mm256_unpacklo_epi16(high_ab, high_cd), fourth = _mm256_unpackhi_epi16(high_ab, high_cd);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(third, fourth, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_permute2x128_si256(first, second, 0x31));
    _mm256_storeu_si256((__m256i *)(out + 96), _mm256_permute2x128_si256(third, fourth, 0x31));
}

static void pack_group(const void *arguments, int64_t begin, int64_t end)
{
    const struct gradient *to = arguments;
    uint8_t *out = group_of_thread(to);
    int64_t bytes = strip_bytes(to->inner);
    /* Strips within, so that the lines of the weight are read whole. */
    for (int64_t row = 0; row < to->inner; row += QUAD)
        for (int64_t strip = begin; strip < end; strip++)
            pack_quad(out + (strip - begin) * bytes + row * STRIP, to, row, strip * STRIP);
}

static void do_tile(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place)
{
    const struct gradient *to = arguments;
    const struct quantized_rows *quantized = &to->quantized;
    int64_t column = strip * STRIP, count = least(to->columns - column, STRIP);
    int32_t sums[TILE_ROWS * STRIP];
    float wide[STRIP];
    multiply_tile(sums, quantized->values + row * quantized->stride, quantized->stride,
                  group_of_thread(to) + place * strip_bytes(to->inner), to->inner, rows);
    for (int64_t end = row + rows, at = 0; row < end; row++, at += STRIP) {
        for (int half = 0; half < 2; half++) {
            int64_t start = half * LANES;
            __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sums + at + start),
                                             _mm512_set1_epi32(quantized->sum[row]));
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(quantized->scale[row]));
            _mm512_storeu_ps(wide + start, with_low_rank(y, &to->added, row, column + start, to->columns));
        }
        store_floats(element(to->out, row * to->columns + column, to->dtype), wide, count, to->dtype);
    }
}

/* out [rows, columns] = s (q weight) + left right with grad [rows, inner] * weight_scale = s q, each row with its s.
 * `weight` is [inner, columns], left [rows, rank] and right [rank, columns]; `groups` has room for
 * a group of strips a thread, `scratch` for inner + 144 bytes a row. */
void int8_input_gradient(const void *grad, int dtype, int64_t rows, int64_t inner, int64_t columns,
                         const int8_t *weight, const float *weight_scale, const float *left, const float *right,
                         int64_t rank, void *out, uint8_t *groups, void *scratch)
{
    struct gradient to = {weight, inner, columns, out, dtype, {left, right, rank}, rows_at(scratch, rows, inner), groups};
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        quantize_row(&to.quantized, row, grad, dtype, inner, weight_scale, 0, 0);
    for_each_tile(rows, inner, columns, pack_group, do_tile, &to);
}
