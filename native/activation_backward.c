/* An activation's backward with the gradient of the bias: mixft/cpu/activation_backward.py. */
#include "activation.h"
#include "blocks.h"

struct job {
    const void *grad, *kept;
    void *out;
    float *partial;
    int64_t rows, columns, row_stride, rows_of_group;
    int grad_dtype, kept_dtype, out_dtype, activation;
};

static inline void add_to(float *restrict sums, const float *restrict values, int64_t length)
{
    for (int64_t i = 0; i < length; i++)
        sums[i] += values[i];
}

static void do_tile(const struct job *job, int64_t group, int64_t first_column)
{
    float values[BLOCK], kept[BLOCK], sums[BLOCK] = {0};
    int64_t rest = job->columns - first_column, length = rest < BLOCK ? rest : BLOCK;
    int64_t begin = group * job->rows_of_group, end = begin + job->rows_of_group;
    for (int64_t row = begin; row < end && row < job->rows; row++) {
        int64_t offset = row * job->columns + first_column;
        const void *grad = element(job->grad, row * job->row_stride + first_column, job->grad_dtype);
        load_floats(values, grad, length, job->grad_dtype);
        if (job->activation != NONE) {
            load_floats(kept, element(job->kept, offset, job->kept_dtype), length, job->kept_dtype);
            multiply_by_slope(values, kept, length, job->activation);
        }
        if (job->out)
            store_floats(element(job->out, offset, job->out_dtype), values, length, job->out_dtype);
        if (job->partial)
            add_to(sums, values, length);
    }
    if (job->partial)
        memcpy(job->partial + group * job->columns + first_column, sums, 4 * length);
}

/* out = grad * activation'(kept), contiguous, and column_sums = its sum over the rows before rounding.
 *
 * `grad` has contiguous rows, `row_stride` elements apart; `kept` is contiguous, and not read where the activation is
 * NONE. `out` or `column_sums` may be null, and `out` may be `grad` where dtype and strides are the same. `partial` has
 * room for the columns of each group of `rows_of_group` rows: the sums of the groups are added in order, whatever the
 * number of threads. */
void activation_backward(const void *grad, int grad_dtype, int64_t row_stride, const void *kept, int kept_dtype,
                         int64_t rows, int64_t columns, int activation, void *out, int out_dtype,
                         int64_t rows_of_group, float *partial, float *column_sums)
{
    struct job job = {grad, kept, out, column_sums ? partial : 0, rows, columns, row_stride, rows_of_group, grad_dtype,
                      kept_dtype, out_dtype, activation};
    int64_t groups = (rows + rows_of_group - 1) / rows_of_group, strips = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t tile = 0; tile < groups * strips; tile++)
        do_tile(&job, tile / strips, tile % strips * BLOCK);
    if (column_sums) {
        memset(column_sums, 0, 4 * columns);
        for (int64_t group = 0; group < groups; group++)
            add_to(column_sums, partial + group * columns, columns);
    }
}
