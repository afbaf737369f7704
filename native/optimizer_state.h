/* Optimizer state in fewer bits, as FP32 in a buffer and back; the formats are those of mixft/cpu/optimizer_state.py,
 * bit for bit. `length` counts elements; groups of 32 that share a scale are whole but for a tensor's last. */
#ifndef MIXFT_OPTIMIZER_STATE_H
#define MIXFT_OPTIMIZER_STATE_H

#include "blocks.h"
#include "floats.h"

#define GROUP 32

/* Steps of the dither. */
#define FIRST_MOMENT 0xD1B54A33u
#define SECOND_MOMENT 0xABC98389u
#define PARAMETER 0x8CB92BA7u

static inline int64_t groups_of(int64_t length)
{
    return (length + GROUP - 1) / GROUP;
}

static inline int32_t least_of(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline int32_t greatest_of(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* Where the dither of each element begins, from its index. */
static inline void fill_phases(uint32_t *restrict phases, int64_t start, int64_t length)
{
    uint32_t first = start;
    for (int32_t i = 0; i < (int32_t)length; i++) {
        uint32_t mixed = (first + i) * 0x9E3779B1u;
        phases[i] = (mixed ^ mixed >> 15) * 0x85EBCA77u;
    }
}

/* The codes of one group and its scale; `phases` NULL rounds to nearest. */
INLINE uint8_t encode_any_group(uint8_t *restrict codes, const float *restrict values, const uint32_t *phases,
                                uint32_t turn, int is_signed)
{
    int32_t eighths[GROUP], largest = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t magnitude = bits_of(values[i]) & 0x7FFFFFFF;
        int32_t addend = phases ? (phases[i] + turn) >> 12 : 0x80000;
        /* A finite value must not round to Inf, nor the bits of a NaN overflow. */
        int32_t rounded = least_of((least_of(magnitude, INFINITY_BITS - 1) + addend) >> 20, 2039);
        rounded = magnitude < (int32_t)INFINITY_BITS ? rounded : 2040;
        /* Of second moments none but a zero becomes zero. */
        eighths[i] = is_signed ? rounded : greatest_of(rounded, least_of(magnitude, 1));
    }
    for (int i = 0; i < GROUP; i++)
        largest = greatest_of(largest, eighths[i]);
    int32_t exponent = largest >> 3, lift = (is_signed ? 120 : 248) - 8 * exponent;
    for (int i = 0; i < GROUP; i++) {
        int32_t code = eighths[i] + lift;
        code = is_signed ? least_of(greatest_of(code, 0), 127) : least_of(greatest_of(code, 1), 255);
        code = eighths[i] > 0 ? code : 0;
        codes[i] = is_signed && values[i] < 0 ? -code : code;
    }
    return exponent;
}

INLINE void decode_any_group(float *restrict values, const uint8_t *codes, uint8_t scale, int is_signed)
{
    /* A group that held a NaN or Inf is all NaN: no other lift comes near this one. */
    int32_t lift = scale == 255 ? 0x1000 : 8 * scale - (is_signed ? 120 : 248);
    for (int i = 0; i < GROUP; i++) {
        int32_t code = is_signed ? (int8_t)codes[i] : codes[i];
        int32_t eighths = greatest_of((code < 0 ? -code : code) + lift, 1);
        int32_t bits = code == 0 ? 0 : (uint32_t)eighths << 20;
        bits = eighths >= 0x1000 ? 0x7FC00000 : bits;
        values[i] = float_of(bits | (is_signed && code < 0 ? 0x80000000u : 0));
    }
}

#ifdef __AVX512F__
/* encode_any_group of finite values, with sixteen bits an element where those suffice; returns 255, and has to be done
 * again, for a group that is not finite. */
INLINE uint8_t encode_finite_group(uint8_t *codes, const float *values, const uint32_t *phases, uint32_t turn,
                                   int is_signed)
{
    __m512i halves[2];
    __mmask16 negative[2];
    for (int half = 0; half < 2; half++) {
        __m512i bits = _mm512_loadu_si512(values + 16 * half), addend = _mm512_set1_epi32(0x80000);
        __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
        if (phases) {
            addend = _mm512_add_epi32(_mm512_loadu_si512(phases + 16 * half), _mm512_set1_epi32(turn));
            addend = _mm512_srli_epi32(addend, 12);
        }
        __m512i sum = _mm512_add_epi32(_mm512_min_epi32(magnitude, _mm512_set1_epi32(INFINITY_BITS)), addend);
        halves[half] = _mm512_srli_epi32(sum, 20);
        if (!is_signed)
            halves[half] = _mm512_max_epi32(halves[half], _mm512_min_epi32(magnitude, _mm512_set1_epi32(1)));
        negative[half] = _mm512_movepi32_mask(bits);
    }
    __m512i eighths = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(halves[0])),
                                         _mm512_cvtepi32_epi16(halves[1]), 1);
    __m256i greatest = _mm256_max_epi16(_mm512_castsi512_si256(eighths), _mm512_extracti64x4_epi64(eighths, 1));
    __m128i largest = _mm_max_epi16(_mm256_castsi256_si128(greatest), _mm256_extracti128_si256(greatest, 1));
    /* There is an instruction for the least of eight, in the lowest lane; all bits turned, it is the largest. */
    largest = _mm_andnot_si128(_mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi16(-1))), _mm_set1_epi16(-1));
    uint8_t exponent = (uint32_t)_mm_cvtsi128_si32(largest) >> 3 & 0xFF;
    __m128i lift = _mm_sub_epi16(_mm_set1_epi16(is_signed ? 120 : 248), _mm_and_si128(largest, _mm_set1_epi16(~7)));
    __m512i code = _mm512_add_epi16(eighths, _mm512_broadcastw_epi16(lift));
    code = _mm512_max_epi16(code, _mm512_set1_epi16(is_signed ? 0 : 1));
    __mmask32 is_zero = _mm512_testn_epi16_mask(eighths, eighths);
    code = _mm512_maskz_min_epi16(~is_zero, code, _mm512_set1_epi16(is_signed ? 127 : 255));
    if (is_signed)
        code = _mm512_mask_sub_epi16(code, _mm512_kunpackw(negative[1], negative[0]), _mm512_setzero_si512(), code);
    _mm256_storeu_si256((__m256i *)codes, _mm512_cvtepi16_epi8(code));
    return exponent;
}

INLINE void decode_finite_group(float *values, const uint8_t *codes, uint8_t scale, int is_signed)
{
    __m256i stored = _mm256_loadu_si256((const __m256i *)codes);
    __m512i code = is_signed ? _mm512_cvtepi8_epi16(stored) : _mm512_cvtepu8_epi16(stored);
    __m512i magnitude = is_signed ? _mm512_abs_epi16(code) : code;
    __m512i eighths = _mm512_add_epi16(magnitude, _mm512_set1_epi16(8 * scale - (is_signed ? 120 : 248)));
    eighths = _mm512_maskz_max_epi16(_mm512_test_epi16_mask(code, code), eighths, _mm512_set1_epi16(1));
    if (is_signed)
        /* The bit that will be the sign. */
        eighths = _mm512_or_si512(eighths, _mm512_and_si512(code, _mm512_set1_epi16(0x800)));
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(eighths));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(eighths, 1));
    _mm512_storeu_si512(values, _mm512_slli_epi32(low, 20));
    _mm512_storeu_si512(values + 16, _mm512_slli_epi32(high, 20));
}
#endif

INLINE uint8_t encode_group(uint8_t *codes, const float *values, const uint32_t *phases, uint32_t turn, int is_signed)
{
#ifdef __AVX512F__
    uint8_t exponent = encode_finite_group(codes, values, phases, turn, is_signed);
    if (__builtin_expect(exponent != 255, 1))
        return exponent;
#endif
    return encode_any_group(codes, values, phases, turn, is_signed);
}

INLINE void decode_group(float *values, const uint8_t *codes, uint8_t scale, int is_signed)
{
#ifdef __AVX512F__
    if (__builtin_expect(scale != 255, 1)) {
        decode_finite_group(values, codes, scale, is_signed);
        return;
    }
#endif
    decode_any_group(values, codes, scale, is_signed);
}

/* `values` has whole groups, the last one filled up with zeros. */
INLINE void encode_codes(uint8_t *codes, uint8_t *scales, const float *values, int64_t length,
                         const uint32_t *phases, uint32_t turn, int is_signed)
{
    int64_t whole = length / GROUP, rest = length % GROUP;
    for (int64_t group = 0; group < whole; group++) {
        int64_t at = group * GROUP;
        scales[group] = encode_group(codes + at, values + at, phases ? phases + at : NULL, turn, is_signed);
    }
    if (rest) {
        uint8_t last[GROUP];
        int64_t at = whole * GROUP;
        scales[whole] = encode_group(last, values + at, phases ? phases + at : NULL, turn, is_signed);
        memcpy(codes + at, last, rest);
    }
}

/* Fills whole groups of `values`, the last one up with zeros. */
INLINE void decode_codes(float *values, const uint8_t *codes, const uint8_t *scales, int64_t length, int is_signed)
{
    int64_t whole = length / GROUP, rest = length % GROUP;
    for (int64_t group = 0; group < whole; group++)
        decode_group(values + group * GROUP, codes + group * GROUP, scales[group], is_signed);
    if (rest) {
        uint8_t last[GROUP] = {0};
        memcpy(last, codes + whole * GROUP, rest);
        decode_group(values + whole * GROUP, last, scales[whole], is_signed);
        for (int64_t i = length; i < (whole + 1) * GROUP; i++)
            values[i] = 0;
    }
}

/* 2^exponent, for exponents of normal numbers. */
static inline float power_of_two(int32_t exponent)
{
    return float_of((uint32_t)(exponent + 127) << 23);
}

/* The exponent of an FP16 number's spacing, plus 10. */
static inline int32_t half_exponent(uint16_t half)
{
    return greatest_of(half >> 10 & 0x1F, 1) - 15;
}

/* Fills `weights` with `params` and their remainders. */
static inline void join_weights(float *restrict weights, const uint16_t *params, const int16_t *remainders,
                                int64_t length, int dtype)
{
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = (uint32_t)params[i] << 16, joined = bits + remainders[i];
            /* Below a zero that was written by hand, an old remainder would turn the sign bit and make a NaN. */
            weights[i] = float_of((joined ^ bits) >> 31 ? bits : joined);
        }
        return;
    }
    load_floats(weights, params, length, dtype);
    for (int64_t i = 0; i < length; i++)
        weights[i] += remainders[i] * power_of_two(half_exponent(params[i]) - 25);
}

static inline void split_weights(uint16_t *restrict params, int16_t *restrict remainders, const float *weights,
                                 int64_t length, int dtype)
{
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = bits_of(weights[i]);
            int is_nan = (bits & 0x7FFFFFFF) > INFINITY_BITS;
            params[i] = is_nan ? 0x7FC0 : (bits + 0x8000) >> 16;
            remainders[i] = is_nan ? 0 : bits;
        }
        return;
    }
    float rounded[BLOCK];
    store_floats(params, weights, length, dtype);
    load_floats(rounded, params, length, dtype);
    for (int64_t i = 0; i < length; i++) {
        /* An overflow has nothing left over: its units are infinite. */
        float units = (weights[i] - rounded[i]) * power_of_two(25 - half_exponent(params[i]));
        int32_t whole = bits_of(units + UNIT_ROUNDER) - bits_of(UNIT_ROUNDER);
        remainders[i] = units >= -16384 && units <= 16384 ? whole : 0;
    }
}

/* FP32 values at 16 bits, up with the probability that makes the mean right. */
static inline void store_stochastically(uint16_t *restrict out, float *values, int64_t length, int dtype,
                                        const uint32_t *phases, uint32_t turn)
{
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits = bits_of(values[i]);
            out[i] = (bits & 0x7FFFFFFF) > INFINITY_BITS ? 0x7FC0 : (bits + ((phases[i] + turn) >> 16)) >> 16;
        }
        return;
    }
    for (int64_t i = 0; i < length; i++) {
        uint32_t bits = bits_of(values[i]), magnitude = bits & 0x7FFFFFFF;
        int32_t exponent = greatest_of((int32_t)(magnitude >> 23) - 127, -14) - 10;
        float fraction = (int32_t)((phases[i] + turn) >> 19) * (1.0f / 8192);
        float multiple = __builtin_floorf(float_of(magnitude) * power_of_two(-exponent) + fraction);
        values[i] = float_of(bits_of(multiple * power_of_two(exponent)) | (bits & 0x80000000u));
    }
    store_floats(out, values, length, dtype);
}

#endif
