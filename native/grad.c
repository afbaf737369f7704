/* Unscaling and gradient statistics: mixft/cpu/grad.py. */
#include "blocks.h"
#include "floats.h"
#include "grad.h"

/* How far beyond a block of 16-bit elements memory is fetched, in bytes. */
#define FETCHED 4096

/* For callers, who bring a number for each block. */
const int32_t gradient_block = BLOCK;

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

/* How many of `length` elements, at most PART, were not finite. */
INLINE int32_t unscale_part(void *grad, float factor, int64_t length, int dtype)
{
    float wide[PART], *values = dtype == FLOAT32 ? grad : wide;
    int32_t nonfinite = 0;
    if (dtype != FLOAT32)
        load_floats(wide, grad, length, dtype);
    for (int64_t i = 0; i < length; i++) {
        nonfinite += is_nonfinite(values[i]);
        values[i] *= factor;
    }
    if (dtype != FLOAT32)
        store_floats(grad, wide, length, dtype);
    return nonfinite;
}

static void unscale_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    int dtype = job->dtypes[tensor];
    void *grads = job->grads[tensor];
    int32_t nonfinite = 0;
    for (; length >= PART; start += PART, length -= PART)
        nonfinite += unscale_part(element(grads, start, dtype), job->factor, PART, dtype);
    nonfinite += unscale_part(element(grads, start, dtype), job->factor, length, dtype);
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

/* Of a whole block, four sums at once: one alone would wait for its own additions. */
static float square_quarters(const float *values, int32_t *nonfinite)
{
    float first = 0, second = 0, third = 0, fourth = 0;
    int32_t found = 0;
#pragma omp simd reduction(+ : first, second, third, fourth, found)
    for (int64_t i = 0; i < BLOCK / 4; i++) {
        float a = values[i], b = values[i + BLOCK / 4], c = values[i + BLOCK / 2], d = values[i + 3 * BLOCK / 4];
        found += is_nonfinite(a) + is_nonfinite(b) + is_nonfinite(c) + is_nonfinite(d);
        first += a * a;
        second += b * b;
        third += c * c;
        fourth += d * d;
    }
    *nonfinite += found;
    return (first + second) + (third + fourth);
}

static void square_gradients(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    int dtype = job->dtypes[tensor];
    const char *grad = element(job->grads[tensor], start, dtype);
    float wide[BLOCK], squares;
    int32_t nonfinite = 0;
    if (dtype == FLOAT32) {
        /* In quarters, memory would be read in four places, which takes longer. */
        squares = square_block((const float *)grad, length, &nonfinite);
    } else if (length == BLOCK) {
        fetch(grad + FETCHED, BLOCK * 2);
        load_floats(wide, grad, BLOCK, dtype);
        squares = square_quarters(wide, &nonfinite);
    } else {
        load_floats(wide, grad, length, dtype);
        squares = square_block(wide, length, &nonfinite);
    }
    job->squares[block] = squares;
    count_nonfinite(job, tensor, nonfinite);
}

void gradient_statistics(void **grads, const int64_t *sizes, const int32_t *dtypes, int64_t count, double *partial,
                         float *squares, int64_t *nonfinite)
{
    struct job job = {.grads = grads, .dtypes = dtypes, .squares = partial, .nonfinite = nonfinite};
    memset(nonfinite, 0, count * sizeof *nonfinite);
    for_each_block(sizes, count, square_gradients, &job);
    int64_t block = 0;
    for (int64_t tensor = 0; tensor < count; tensor++) {
        double total = 0;
        for (int64_t last = block + blocks_of(sizes[tensor]); block < last; block++)
            total += partial[block];
        squares[tensor] = total;
    }
}
