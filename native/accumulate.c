/* Micro-batch gradients added to FP32 buffers: mixft/cpu/accumulate.py. */
#include "blocks.h"
#include "floats.h"

struct job {
    void **grads;
    float **buffers;
    const int32_t *dtypes;
    float factor;
    int overwrite, clear;
    int64_t *nonfinite;
};

static void accumulate_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    int dtype = job->dtypes[tensor];
    void *grad = element(job->grads[tensor], start, dtype);
    float *buffer = job->buffers[tensor] + start, factor = job->factor, wide[BLOCK];
    int32_t nonfinite = 0;
    load_floats(wide, grad, length, dtype);
    if (job->overwrite)
        for (int64_t i = 0; i < length; i++) {
            nonfinite += is_nonfinite(wide[i]);
            buffer[i] = wide[i] * factor;
        }
    else
        for (int64_t i = 0; i < length; i++) {
            nonfinite += is_nonfinite(wide[i]);
            buffer[i] += wide[i] * factor;
        }
    if (job->clear)
        memset(grad, 0, length * bytes_of(dtype));
    if (nonfinite) {
#pragma omp atomic
        job->nonfinite[tensor] += nonfinite;
    }
}

/* Per tensor: buffer = (overwrite ? 0 : buffer) + factor * grad, and nonfinite grows by the NaN and Inf of grad. */
void accumulate_gradients(void **grads, float **buffers, const int64_t *sizes, const int32_t *dtypes, int64_t count,
                          float factor, int overwrite, int clear, int64_t *nonfinite)
{
    struct job job = {grads, buffers, dtypes, factor, overwrite, clear, nonfinite};
    for_each_block(sizes, count, accumulate_block, &job);
}
