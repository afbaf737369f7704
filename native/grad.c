/* Unscaling and gradient statistics: mixft/cpu/grad.py. */
#include "blocks.h"
#include "floats.h"
#include "grad.h"

struct job {
    void **grads;
    const int32_t *dtypes;
    float factor;
    double *squares; /* of each block */
    int64_t *nonfinite;
};

static inline void count_nonfinite(const struct job *job, int64_t tensor, int32_t nonfinite)
{
    if (nonfinite) {
#pragma omp atomic
        job->nonfinite[tensor] += nonfinite;
    }
}

static void unscale_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    int dtype = job->dtypes[tensor];
    void *grad = element(job->grads[tensor], start, dtype);
    float wide[BLOCK], factor = job->factor, *values = dtype == FLOAT32 ? grad : wide;
    int32_t nonfinite = 0;
    if (dtype != FLOAT32)
        load_floats(wide, grad, length, dtype);
    for (int64_t i = 0; i < length; i++) {
        nonfinite += is_nonfinite(values[i]);
        values[i] *= factor;
    }
    if (dtype != FLOAT32)
        store_floats(grad, wide, length, dtype);
    count_nonfinite(job, tensor, nonfinite);
}

/* Per tensor: grad *= factor, rounded once, and nonfinite grows by the NaN and Inf that were in grad. */
void unscale_gradients(void **grads, const int64_t *sizes, const int32_t *dtypes, int64_t count, float factor,
                       int64_t *nonfinite)
{
    struct job job = {.grads = grads, .dtypes = dtypes, .factor = factor, .nonfinite = nonfinite};
    for_each_block(sizes, count, unscale_block, &job);
}

/* The sum of squares of up to BLOCK elements; *nonfinite grows by their NaN and Inf. */
static float square_block(const float *values, int64_t length, int32_t *nonfinite)
{
    float squares = 0;
    int32_t found = 0;
#pragma omp simd reduction(+ : squares, found)
    for (int64_t i = 0; i < length; i++) {
        found += is_nonfinite(values[i]);
        squares += values[i] * values[i];
    }
    *nonfinite += found;
    return squares;
}

/* Four sums at once: each alone would wait for its own additions. */
static void square_four(const float *values, double *squares, int32_t *nonfinite)
{
    float first = 0, second = 0, third = 0, fourth = 0;
    int32_t found = 0;
#pragma omp simd reduction(+ : first, second, third, fourth, found)
    for (int64_t i = 0; i < BLOCK; i++) {
        float a = values[i], b = values[i + BLOCK], c = values[i + 2 * BLOCK], d = values[i + 3 * BLOCK];
        found += is_nonfinite(a) + is_nonfinite(b) + is_nonfinite(c) + is_nonfinite(d);
        first += a * a;
        second += b * b;
        third += c * c;
        fourth += d * d;
    }
    squares[0] = first;
    squares[1] = second;
    squares[2] = third;
    squares[3] = fourth;
    *nonfinite += found;
}

static void square_blocks(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    int dtype = job->dtypes[tensor];
    const void *grad = element(job->grads[tensor], start, dtype);
    float wide[4 * BLOCK];
    int32_t nonfinite = 0;
    const float *values = grad;
    if (dtype != FLOAT32) {
        load_floats(wide, grad, length, dtype);
        values = wide;
    }
    double *squares = job->squares + block;
    /* Of FP32 the four would be read in four places of memory, which takes longer. */
    if (values == wide && length == 4 * BLOCK)
        square_four(values, squares, &nonfinite);
    else
        for (; length > 0; length -= BLOCK, values += BLOCK)
            *squares++ = square_block(values, length < BLOCK ? length : BLOCK, &nonfinite);
    count_nonfinite(job, tensor, nonfinite);
}

void gradient_statistics(void **grads, const int64_t *sizes, const int32_t *dtypes, int64_t count, double *partial,
                         float *squares, int64_t *nonfinite)
{
    struct job job = {.grads = grads, .dtypes = dtypes, .squares = partial, .nonfinite = nonfinite};
    memset(nonfinite, 0, count * sizeof *nonfinite);
    for_each_blocks(sizes, count, 4 * BLOCK, square_blocks, &job);
    int64_t block = 0;
    for (int64_t tensor = 0; tensor < count; tensor++) {
        double total = 0;
        for (int64_t last = block + blocks_of(sizes[tensor]); block < last; block++)
            total += partial[block];
        squares[tensor] = total;
    }
}
