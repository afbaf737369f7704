/* An int8 weight in the strips of int8_tile.h. */
#ifndef MIXFT_INT8_PACK_H
#define MIXFT_INT8_PACK_H

#include "int8_tile.h"

/* DEPTH bytes of so many columns fill 16 bytes. */
enum { SIDE = 16 / DEPTH };

/* Bytes of a column packed at a time. More columns at a time would displace each other from the first-level cache where
 * they are a power of two apart. */
enum { CHUNK = 128 };

/* Four numbers of each of four columns, stored as four depths of a strip. */
static inline void store_depths(uint8_t *out, __m128i a, __m128i b, __m128i c, __m128i d)
{
    __m128i low_ab = _mm_unpacklo_epi32(a, b), high_ab = _mm_unpackhi_epi32(a, b);
    __m128i low_cd = _mm_unpacklo_epi32(c, d), high_cd = _mm_unpackhi_epi32(c, d);
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi64(low_ab, low_cd));
    _mm_storeu_si128((__m128i *)(out + STRIP * DEPTH), _mm_unpackhi_epi64(low_ab, low_cd));
    _mm_storeu_si128((__m128i *)(out + 2 * STRIP * DEPTH), _mm_unpacklo_epi64(high_ab, high_cd));
    _mm_storeu_si128((__m128i *)(out + 3 * STRIP * DEPTH), _mm_unpackhi_epi64(high_ab, high_cd));
}

/* 16 bytes of each of SIDE columns, which are `inner` bytes apart. */
static inline void pack_square(uint8_t *out, const int8_t *weight, int64_t inner)
{
    __m128i column[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i++)
        column[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(weight + i * inner)), _mm_set1_epi8((char)OFFSET));
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    store_depths(out, column[0], column[1], column[2], column[3]);
#else
    __m128i low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        low[i] = _mm_unpacklo_epi16(column[2 * i], column[2 * i + 1]);
        high[i] = _mm_unpackhi_epi16(column[2 * i], column[2 * i + 1]);
    }
    store_depths(out, low[0], low[1], low[2], low[3]);
    store_depths(out + 4 * STRIP * DEPTH, high[0], high[1], high[2], high[3]);
#endif
}

/* `count` bytes, up to DEPTH, each as w + OFFSET. */
static inline depth_bytes with_offset(const int8_t *from, int64_t count)
{
    depth_bytes bytes = 0;
    memcpy(&bytes, from, count);
    return bytes ^ OFFSETS;
}

/* Strip number `strip` of `weight` [columns, inner]. */
static inline void pack_by_column(uint8_t *out, const int8_t *weight, int64_t columns, int64_t inner, int64_t strip)
{
    int64_t first = strip * STRIP, count = columns - first < STRIP ? columns - first : STRIP;
    int64_t squares = count == STRIP ? inner / 16 * 16 : 0;
    weight += first * inner;
    for (int64_t begin = 0; begin < squares; begin += CHUNK)
        for (int column = 0; column < STRIP; column += SIDE)
            for (int64_t k = begin; k < begin + CHUNK && k < squares; k += 16)
                pack_square(out + (k * STRIP + column * DEPTH), weight + column * inner + k, inner);
    for (int64_t column = 0; column < count; column++) {
        depth_bytes *to = (depth_bytes *)out + column;
        for (int64_t k = squares; k < inner; k += DEPTH)
            to[k / DEPTH * STRIP] = with_offset(weight + column * inner + k, inner - k < DEPTH ? inner - k : DEPTH);
    }
}

/* One depth of a strip of a weight [inner, columns]: DEPTH of its rows, the bytes of their columns side by side. */
static inline void interleave(uint8_t *restrict out, const int8_t *restrict rows, int64_t stride)
{
    for (int column = 0; column < STRIP; column++)
        for (int row = 0; row < DEPTH; row++)
            out[column * DEPTH + row] = (uint8_t)rows[row * stride + column] ^ OFFSET;
}

/* The strips from `begin` up to `end` of `weight` [inner, columns]. */
static inline void pack_by_row(uint8_t *out, const int8_t *weight, int64_t columns, int64_t inner, int64_t begin,
                               int64_t end)
{
    int64_t bytes = strip_bytes(inner);
    /* Strips within, so that the lines of the weight are read whole. */
    for (int64_t row = 0; row < inner; row += DEPTH)
        for (int64_t strip = begin; strip < end; strip++) {
            int64_t column = strip * STRIP, width = columns - column < STRIP ? columns - column : STRIP;
            int64_t height = inner - row < DEPTH ? inner - row : DEPTH;
            const int8_t *from = weight + row * columns + column;
            uint8_t *target = out + (strip - begin) * bytes + row * STRIP;
            int8_t edge[DEPTH * STRIP] = {0};
            if (width == STRIP && height == DEPTH) {
                interleave(target, from, columns);
            } else {
                for (int64_t i = 0; i < height; i++)
                    memcpy(edge + i * STRIP, from + i * columns, width);
                interleave(target, edge, STRIP);
            }
        }
}

#endif
