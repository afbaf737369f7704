/* Optimizer state in fewer bits: mixft/cpu/optimizer_state.py. */
#include "optimizer_state.h"

struct arguments {
    void *narrow, *beside;
    float *wide;
    int kind; /* the dtype of a parameter, or whether codes are signed */
};

static void encode_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct arguments *to = of;
    uint8_t *codes = (uint8_t *)to->narrow + start, *scales = (uint8_t *)to->beside + start / GROUP;
    float values[BLOCK] = {0};
    memcpy(values, to->wide + start, 4 * length);
    if (to->kind)
        encode_codes(codes, scales, values, length, NULL, 0, 1);
    else
        encode_codes(codes, scales, values, length, NULL, 0, 0);
}

/* Codes and scales of FP32 values, rounded to nearest. */
void encode_state(uint8_t *codes, uint8_t *scales, float *values, int64_t size, int is_signed)
{
    struct arguments to = {codes, scales, values, is_signed};
    for_each_block(&size, 1, encode_block, &to);
}

static void decode_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct arguments *to = of;
    const uint8_t *codes = (uint8_t *)to->narrow + start, *scales = (uint8_t *)to->beside + start / GROUP;
    float values[BLOCK];
    if (to->kind)
        decode_codes(values, codes, scales, length, 1);
    else
        decode_codes(values, codes, scales, length, 0);
    memcpy(to->wide + start, values, 4 * length);
}

/* The FP32 values of codes and scales. */
void decode_state(uint8_t *codes, uint8_t *scales, float *values, int64_t size, int is_signed)
{
    struct arguments to = {codes, scales, values, is_signed};
    for_each_block(&size, 1, decode_block, &to);
}

static void split_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct arguments *to = of;
    uint16_t *params = to->narrow;
    int16_t *remainders = to->beside;
    split_weights(params + start, remainders + start, to->wide + start, length, to->kind);
}

/* FP32 weights as 16-bit parameters and what these lack. */
void split_master(uint16_t *params, int16_t *remainders, float *weights, int64_t size, int dtype)
{
    struct arguments to = {params, remainders, weights, dtype};
    for_each_block(&size, 1, split_block, &to);
}

static void join_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct arguments *to = of;
    const uint16_t *params = to->narrow;
    const int16_t *remainders = to->beside;
    join_weights(to->wide + start, params + start, remainders + start, length, to->kind);
}

/* The FP32 weights of parameters and their remainders. */
void join_master(uint16_t *params, int16_t *remainders, float *weights, int64_t size, int dtype)
{
    struct arguments to = {params, remainders, weights, dtype};
    for_each_block(&size, 1, join_block, &to);
}
