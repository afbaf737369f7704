/* Vectors of the int8 products: bytes that are multiplied, sums in int32, and floats.
 *
 * VNNI multiplies four unsigned bytes by four signed ones and adds the products in int32; AVX2 without it multiplies
 * pairs of int16, since its products of bytes would saturate.
 */
#ifndef MIXFT_INT8_VECTORS_H
#define MIXFT_INT8_VECTORS_H

#include <immintrin.h>
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

/* The compiler's intrinsics make it copy the sums around, here and below. */
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
    __asm__("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(_mm256_madd_epi16(weights, values)));
#endif
}
#endif

static inline floats load_vector(const float *from)
{
    floats vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline void store_vector(float *to, floats vector)
{
    memcpy(to, &vector, sizeof vector);
}

static inline integers load_integers(const int32_t *from)
{
    integers vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

/* a b + c, rounded once. */
static inline floats multiply_add(floats a, float b, floats c)
{
#ifdef __AVX512VNNI__
    return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c);
#else
    return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c);
#endif
}

/* sums - excess - row_excess, modulo 2^32, as floats. */
static inline floats difference(integers sums, integers excess, int32_t row_excess)
{
#ifdef __AVX512VNNI__
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_sub_epi32(sums, _mm512_set1_epi32(row_excess)), excess));
#else
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_sub_epi32(sums, _mm256_set1_epi32(row_excess)), excess));
#endif
}

#endif
