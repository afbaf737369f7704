/* The noise of stochastic rounding: the bits that rounding_noise of kernels/int8_rounding.py draws, from Philox 4x32
 * of seven rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011). One counter: eight elements. */
#ifndef MIXFT_ROUNDING_NOISE_H
#define MIXFT_ROUNDING_NOISE_H

#include <stdint.h>
#include <string.h>

#include "inline.h"

/* Counters worked on at a time: their state stays in registers. */
#define COUNTERS 16

/* The random bits of COUNTERS counters: words[0..3] go in as the counters' words and come out as theirs. */
INLINE void philox(uint32_t words[4][COUNTERS], uint64_t seed)
{
#pragma omp simd
    for (int i = 0; i < COUNTERS; i++) {
        uint32_t a = words[0][i], b = words[1][i], c = words[2][i], d = words[3][i];
#pragma GCC unroll 7
        for (uint32_t round = 0; round < 7; round++) {
            uint64_t even = (uint64_t)0xD2511F53u * a, odd = (uint64_t)0xCD9E8D57u * c;
            a = (uint32_t)(odd >> 32) ^ b ^ ((uint32_t)seed + round * 0x9E3779B9u);
            c = (uint32_t)(even >> 32) ^ d ^ ((uint32_t)(seed >> 32) + round * 0xBB67AE85u);
            b = odd;
            d = even;
        }
        words[0][i] = a;
        words[1][i] = b;
        words[2][i] = c;
        words[3][i] = d;
    }
}

/* Most columns that are worked on at a time. */
#define PANEL 512

/* Random bits for `length` elements of a row from `first`, a multiple of 8, on; rounded up to COUNTERS counters. */
static inline void row_noise(uint16_t *noise, int64_t group, int64_t first, int64_t length, uint64_t seed)
{
    for (int64_t word = 0; word * 8 < length; word += COUNTERS) {
        uint32_t words[4][COUNTERS];
        for (int i = 0; i < COUNTERS; i++) {
            words[0][i] = first / 8 + word + i;
            words[1][i] = group;
            words[2][i] = group >> 32;
            words[3][i] = 0;
        }
        philox(words, seed);
        uint32_t out[4 * COUNTERS];
        for (int i = 0; i < COUNTERS; i++) {
            out[4 * i] = (words[0][i] & 0xFFFF) | words[2][i] << 16;
            out[4 * i + 1] = (words[1][i] & 0xFFFF) | words[3][i] << 16;
            out[4 * i + 2] = words[0][i] >> 16 | (words[2][i] & 0xFFFF0000);
            out[4 * i + 3] = words[1][i] >> 16 | (words[3][i] & 0xFFFF0000);
        }
        memcpy(noise + word * 8, out, sizeof out);
    }
}

/* The same for neighbouring columns: eight positions of each from `first` on. */
static inline void column_noise(uint16_t noise[8][PANEL], int64_t group, int64_t groups, int64_t first, uint64_t seed)
{
    static const int order[4] = {0, 2, 1, 3};
    for (int64_t column = 0; column < groups; column += COUNTERS) {
        uint32_t words[4][COUNTERS];
        for (int i = 0; i < COUNTERS; i++) {
            words[0][i] = first / 8;
            words[1][i] = group + column + i;
            words[2][i] = (group + column + i) >> 32;
            words[3][i] = 0;
        }
        philox(words, seed);
        for (int position = 0; position < 4; position++)
#pragma omp simd
            for (int i = 0; i < COUNTERS; i++) {
                noise[position][column + i] = words[order[position]][i];
                noise[position + 4][column + i] = words[order[position]][i] >> 16;
            }
    }
}

#endif
