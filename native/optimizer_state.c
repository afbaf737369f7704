/* Optimizer state in fewer bits: mixft/cpu/optimizer_state.py. */
#include "optimizer_state.h"

struct job {
    void *narrow, *beside;
    float *wide;
    int kind; /* the dtype of a parameter, or whether codes are signed */
};

static void encode_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    uint8_t *codes = (uint8_t *)job->narrow + start, *scales = (uint8_t *)job->beside + start / GROUP;
    float values[BLOCK] = {0};
    memcpy(values, job->wide + start, 4 * length);
    if (job->kind)
        encode_codes(codes, scales, values, length, NULL, 0, 1);
    else
        encode_codes(codes, scales, values, length, NULL, 0, 0);
}

/* Codes and scales of FP32 values, rounded to nearest. */
void encode_state(uint8_t *codes, uint8_t *scales, float *values, int64_t size, int is_signed)
{
    struct job job = {codes, scales, values, is_signed};
    for_each_block(&size, 1, encode_block, &job);
}

static void decode_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    const uint8_t *codes = (uint8_t *)job->narrow + start, *scales = (uint8_t *)job->beside + start / GROUP;
    float values[BLOCK];
    if (job->kind)
        decode_codes(values, codes, scales, length, 1);
    else
        decode_codes(values, codes, scales, length, 0);
    memcpy(job->wide + start, values, 4 * length);
}

/* The FP32 values of codes and scales. */
void decode_state(uint8_t *codes, uint8_t *scales, float *values, int64_t size, int is_signed)
{
    struct job job = {codes, scales, values, is_signed};
    for_each_block(&size, 1, decode_block, &job);
}

static void split_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    uint16_t *params = job->narrow;
    int16_t *remainders = job->beside;
    split_weights(params + start, remainders + start, job->wide + start, length, job->kind);
}

/* FP32 weights as 16-bit parameters and what these lack. */
void split_master(uint16_t *params, int16_t *remainders, float *weights, int64_t size, int dtype)
{
    struct job job = {params, remainders, weights, dtype};
    for_each_block(&size, 1, split_block, &job);
}

static void join_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    const uint16_t *params = job->narrow;
    const int16_t *remainders = job->beside;
    join_weights(job->wide + start, params + start, remainders + start, length, job->kind);
}

/* The FP32 weights of parameters and their remainders. */
void join_master(uint16_t *params, int16_t *remainders, float *weights, int64_t size, int dtype)
{
    struct job job = {params, remainders, weights, dtype};
    for_each_block(&size, 1, join_block, &job);
}
