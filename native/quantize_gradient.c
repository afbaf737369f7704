/* A gradient in int8 by rows and by columns: mixft/cpu/quantize_gradient.py. */
#include "blocks.h"
#include "int8_rounding.h"
#include "rounding_noise.h"

/* Rows whose column sums are added up before they are added to others': the same whatever the number of threads. */
#define ROWS 32
const int32_t quantize_gradient_rows = ROWS;

struct job {
    const void *grad;
    int dtype;
    int64_t rows, columns, stride;
    const float *row_factor, *column_factor;
    const uint64_t *row_seed, *column_seed;
    uint8_t *row_values, *column_values;
    float *row_scale, *column_scale;
    int32_t *highs; /* [blocks, columns] of each block of ROWS rows */
    float *sums;
    float *inverse; /* [columns] */
};

static inline int64_t length_at(const struct job *job, int64_t start)
{
    return job->columns - start < BLOCK ? job->columns - start : BLOCK;
}

static inline void load_block(float *wide, const struct job *job, int64_t row, int64_t start)
{
    load_floats(wide, element(job->grad, row * job->stride + start, job->dtype), length_at(job, start), job->dtype);
}

static inline void multiply(float *restrict out, const float *restrict in, const float *restrict factor,
                            int64_t length)
{
    for (int64_t i = 0; i < length; i++)
        out[i] = in[i] * factor[i];
}

/* Everything of one row but its column values: those wait for the columns' scales. */
static void do_row(const struct job *job, int64_t row, int32_t *restrict highs, float *restrict sums)
{
    float wide[BLOCK], scaled[BLOCK], row_factor = job->row_factor[row], inverse, zero = 0;
    uint16_t noise[BLOCK];
    int32_t high = 0;
    uint32_t low = 0;
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        int64_t length = length_at(job, start);
        load_block(wide, job, row, start);
        multiply(scaled, wide, job->column_factor + start, length);
        widen_range(&high, &low, scaled, length, 1, 1, 1);
        for (int64_t i = 0; i < length; i++)
            sums[start + i] += wide[i];
        for (int64_t i = 0; i < length; i++)
            wide[i] *= row_factor;
        widen_range(highs + start, &low, wide, length, 0, 1, 1);
    }
    find_symmetric_scale(high, job->row_scale + row, &inverse);
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        int64_t length = length_at(job, start);
        uint8_t *out = job->row_values + row * job->columns + start;
        if (job->columns > BLOCK) {
            load_block(wide, job, row, start);
            multiply(scaled, wide, job->column_factor + start, length);
        }
        if (job->row_seed) {
            row_noise(noise, row, start, length, *job->row_seed);
            round_each(out, scaled, &inverse, &zero, noise, length, 1, -127, UNIT_ROUNDER);
        } else {
            round_inside(out, scaled, &inverse, length, 1, UNIT_ROUNDER);
        }
    }
}

static void do_rows(const struct job *job, int64_t block)
{
    int32_t *highs = job->highs + block * job->columns;
    float *sums = job->sums + block * job->columns;
    memset(highs, 0, job->columns * sizeof *highs);
    memset(sums, 0, job->columns * sizeof *sums);
    for (int64_t row = block * ROWS; row < job->rows && row < (block + 1) * ROWS; row++)
        do_row(job, row, highs, sums);
}

/* The blocks' largest magnitudes and sums of one column, in the first block's place; its scale. */
static void finish_columns(const struct job *job, int64_t first, int64_t last, int64_t blocks)
{
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t column = first; column < last; column++) {
            int32_t high = job->highs[block * job->columns + column];
            job->highs[column] = high > job->highs[column] ? high : job->highs[column];
            job->sums[column] += job->sums[block * job->columns + column];
        }
    for (int64_t column = first; column < last; column++)
        find_symmetric_scale(job->highs[column], job->column_scale + column, job->inverse + column);
}

static void round_columns(const struct job *job, int64_t block)
{
    static const float zeros[PANEL];
    float wide[PANEL];
    uint16_t noise[8][PANEL];
    for (int64_t start = 0; start < job->columns; start += PANEL) {
        int64_t length = job->columns - start < PANEL ? job->columns - start : PANEL;
        for (int64_t row = block * ROWS; row < job->rows && row < (block + 1) * ROWS; row++) {
            uint8_t *out = job->column_values + row * job->columns + start;
            float factor = job->row_factor[row];
            load_floats(wide, element(job->grad, row * job->stride + start, job->dtype), length, job->dtype);
            for (int64_t i = 0; i < length; i++)
                wide[i] *= factor;
            if (job->column_seed) {
                if (row % 8 == 0)
                    column_noise(noise, start, length, row, *job->column_seed);
                round_each(out, wide, job->inverse + start, zeros, noise[row % 8], length, 0, -127, UNIT_ROUNDER);
            } else {
                round_inside(out, wide, job->inverse + start, length, 0, UNIT_ROUNDER);
            }
        }
    }
}

/* grad [rows, columns] times column_factor by rows, and times row_factor by columns, as int8 [rows, columns] with
 * scales; its column sums are left in the first row of `sums`. `highs` and `sums` have room for a row for each ROWS
 * rows, `inverse` for one. */
void quantize_gradient(const void *grad, int dtype, int64_t rows, int64_t columns, int64_t stride,
                       const float *row_factor, const float *column_factor, const uint64_t *row_seed,
                       const uint64_t *column_seed, void *row_values, float *row_scale, void *column_values,
                       float *column_scale, int32_t *highs, float *sums, float *inverse)
{
    struct job job = {grad, dtype, rows, columns, stride, row_factor, column_factor, row_seed, column_seed, row_values,
                      column_values, row_scale, column_scale, highs, sums, inverse};
    int64_t blocks = (rows + ROWS - 1) / ROWS, panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        do_rows(&job, block);
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t panel = 0; panel < panels; panel++)
        finish_columns(&job, panel * PANEL, (panel + 1) * PANEL < columns ? (panel + 1) * PANEL : columns, blocks);
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        round_columns(&job, block);
}
