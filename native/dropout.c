/* Dropout of contiguous elements: mixft/cpu/dropout.py. */
#include "blocks.h"
#include "floats.h"
#include "rounding_noise.h"

struct job {
    const void *x;
    void *out;
    int dtype;
    uint32_t dropped;
    float scale;
    uint64_t seed;
};

static void drop_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    const struct job *job = context;
    float wide[BLOCK], scale = job->scale;
    uint32_t dropped = job->dropped;
    uint16_t bits[BLOCK];
    row_noise(bits, block, 0, length, job->seed);
    load_floats(wide, element(job->x, start, job->dtype), length, job->dtype);
    /* A product, so that NaN and infinity stay visible where they are dropped. */
    for (int64_t i = 0; i < length; i++)
        wide[i] *= bits[i] >= dropped ? scale : 0;
    store_floats(element(job->out, start, job->dtype), wide, length, job->dtype);
}

/* out = x scale where the element's 16 random bits, which follow from the seed, are `dropped` or more, else 0. */
void dropout(const void *x, void *out, int64_t size, int dtype, int dropped, float scale, int64_t seed)
{
    struct job job = {x, out, dtype, dropped, scale, seed};
    for_each_block(&size, 1, drop_block, &job);
}
