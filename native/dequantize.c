/* int8 back to floats: mixft/cpu/dequantize.py. */
#include "blocks.h"
#include "floats.h"

struct job {
    const int8_t *values;
    const float *scale;
    const int32_t *zero_point;
    void *out;
    int dtype;
};

/* `length` elements from `start` on of one group, or of as many neighbouring columns from `group` on. */
INLINE void restore(const struct job *job, int64_t start, int64_t length, int64_t group, int row)
{
    const int8_t *restrict values = job->values + start;
    const float *restrict scale = job->scale + group;
    const int32_t *restrict zero_point = job->zero_point ? job->zero_point + group : 0;
    void *out = element(job->out, start, job->dtype);
    float buffer[BLOCK], factor = *scale, zero = zero_point ? *zero_point : 0;
    float *restrict wide = job->dtype == FLOAT32 ? out : buffer;
    if (row)
        for (int64_t i = 0; i < length; i++)
            wide[i] = (values[i] - zero) * factor;
    else if (zero_point)
        for (int64_t i = 0; i < length; i++)
            wide[i] = ((float)values[i] - (float)zero_point[i]) * scale[i];
    else
        for (int64_t i = 0; i < length; i++)
            wide[i] = values[i] * scale[i];
    if (job->dtype != FLOAT32)
        store_floats(out, wide, length, job->dtype);
}

/* out = (values - zero_point) scale, both contiguous [outer, n, inner], with a scale for each [outer, 1, inner]. */
void dequantize(const int8_t *values, const float *scale, const int32_t *zero_point, void *out, int dtype,
                int64_t outer, int64_t n, int64_t inner)
{
    struct job job = {values, scale, zero_point, out, dtype};
    int64_t runs = inner == 1 ? outer : outer * n, run = inner == 1 ? n : inner;
    int64_t blocks = blocks_of(run);
#pragma omp parallel for schedule(static) if (outer * n * inner > SMALL)
    for (int64_t index = 0; index < runs * blocks; index++) {
        int64_t at = index / blocks, first = index % blocks * BLOCK, rest = run - first;
        int64_t length = rest < BLOCK ? rest : BLOCK;
        if (inner == 1)
            restore(&job, at * run + first, length, at, 1);
        else
            restore(&job, at * run + first, length, at / n * inner + first, 0);
    }
}
