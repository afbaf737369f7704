/* A gradient in int8 by rows and by columns: mixft/cpu/quantize_gradient.py. */
#include "blocks.h"
#include "int8_rounding.h"
#include "rounding_noise.h"

/* Rows whose column sums are added up before they are added to others': the same whatever the number of threads. */
#define ROWS 32

struct arguments {
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

static inline int64_t length_at(const struct arguments *to, int64_t start)
{
    return to->columns - start < BLOCK ? to->columns - start : BLOCK;
}

static inline void load_block(float *wide, const struct arguments *to, int64_t row, int64_t start)
{
    load_floats(wide, element(to->grad, row * to->stride + start, to->dtype), length_at(to, start), to->dtype);
}

static inline void multiply(float *restrict out, const float *restrict in, const float *restrict factor,
                            int64_t length)
{
    for (int64_t i = 0; i < length; i++)
        out[i] = in[i] * factor[i];
}

/* Everything of one row but its column values: those wait for the columns' scales. */
static void do_row(const struct arguments *to, int64_t row, int32_t *restrict highs, float *restrict sums)
{
    float wide[BLOCK], scaled[BLOCK], row_factor = to->row_factor[row], inverse, zero = 0;
    uint16_t noise[BLOCK];
    int32_t high = 0;
    uint32_t low = 0;
    for (int64_t start = 0; start < to->columns; start += BLOCK) {
        int64_t length = length_at(to, start);
        load_block(wide, to, row, start);
        multiply(scaled, wide, to->column_factor + start, length);
        widen_range(&high, &low, scaled, length, 1, 1, 1);
        for (int64_t i = 0; i < length; i++)
            sums[start + i] += wide[i];
        for (int64_t i = 0; i < length; i++)
            wide[i] *= row_factor;
        widen_range(highs + start, &low, wide, length, 0, 1, 1);
    }
    find_symmetric_scale(high, to->row_scale + row, &inverse);
    for (int64_t start = 0; start < to->columns; start += BLOCK) {
        int64_t length = length_at(to, start);
        uint8_t *out = to->row_values + row * to->columns + start;
        if (to->columns > BLOCK) {
            load_block(wide, to, row, start);
            multiply(scaled, wide, to->column_factor + start, length);
        }
        if (to->row_seed) {
            row_noise(noise, row, start, length, *to->row_seed);
            round_each(out, scaled, &inverse, &zero, noise, length, 1, -127, UNIT_ROUNDER);
        } else {
            round_inside(out, scaled, &inverse, length, 1, UNIT_ROUNDER);
        }
    }
}

static void do_rows(const struct arguments *to, int64_t block)
{
    int32_t *highs = to->highs + block * to->columns;
    float *sums = to->sums + block * to->columns;
    memset(highs, 0, to->columns * sizeof *highs);
    memset(sums, 0, to->columns * sizeof *sums);
    for (int64_t row = block * ROWS; row < to->rows && row < (block + 1) * ROWS; row++)
        do_row(to, row, highs, sums);
}

/* The blocks' largest magnitudes and sums of one column, in the first block's place; its scale. */
static void finish_columns(const struct arguments *to, int64_t first, int64_t last, int64_t blocks)
{
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t column = first; column < last; column++) {
            int32_t high = to->highs[block * to->columns + column];
            to->highs[column] = high > to->highs[column] ? high : to->highs[column];
            to->sums[column] += to->sums[block * to->columns + column];
        }
    for (int64_t column = first; column < last; column++)
        find_symmetric_scale(to->highs[column], to->column_scale + column, to->inverse + column);
}

static void round_columns(const struct arguments *to, int64_t block)
{
    static const float zeros[PANEL];
    float wide[PANEL];
    uint16_t noise[8][PANEL];
    for (int64_t start = 0; start < to->columns; start += PANEL) {
        int64_t length = to->columns - start < PANEL ? to->columns - start : PANEL;
        for (int64_t row = block * ROWS; row < to->rows && row < (block + 1) * ROWS; row++) {
            uint8_t *out = to->column_values + row * to->columns + start;
            float factor = to->row_factor[row];
            load_floats(wide, element(to->grad, row * to->stride + start, to->dtype), length, to->dtype);
            for (int64_t i = 0; i < length; i++)
                wide[i] *= factor;
            if (to->column_seed) {
                if (row % 8 == 0)
                    column_noise(noise, start, length, row, *to->column_seed);
                round_each(out, wide, to->inverse + start, zeros, noise[row % 8], length, 0, -127, UNIT_ROUNDER);
            } else {
                round_inside(out, wide, to->inverse + start, length, 0, UNIT_ROUNDER);
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
    struct arguments to = {grad,          dtype,      rows,        columns,    stride,        row_factor,
                           column_factor, row_seed,   column_seed, row_values, column_values, row_scale,
                           column_scale,  highs,      sums,        inverse};
    int64_t blocks = (rows + ROWS - 1) / ROWS, panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        do_rows(&to, block);
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t panel = 0; panel < panels; panel++)
        finish_columns(&to, panel * PANEL, (panel + 1) * PANEL < columns ? (panel + 1) * PANEL : columns, blocks);
#pragma omp parallel for schedule(static) if (rows * columns > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        round_columns(&to, block);
}
