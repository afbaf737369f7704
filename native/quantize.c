/* int8 quantization along one dimension: mixft/cpu/compiled_quantize.py; formulas in kernels/quantize.py.
 *
 * A unit of work is a row, or a panel of neighbouring columns. Its ranges are found, then it is rounded, from the cache
 * where it fits. Where there are fewer units than threads have use for, each is split along n, in two sweeps.
 */
#include "blocks.h"
#include "floats.h"
#include "int8_rounding.h"
#include "rounding_noise.h"

const int32_t quantize_panel = PANEL;

struct job {
    const void *x; /* [outer, n, inner], without gaps along inner, or along n where inner is 1 */
    int dtype;
    int64_t outer, n, inner, outer_stride, n_stride;
    const float *factor;  /* [n], or none */
    const uint64_t *seed; /* or none: round to the nearest */
    int symmetric, propagate;
    float rounder; /* UNIT_ROUNDER, and 128 more for unsigned bytes around 128 */
    uint8_t *values;
    float *scale;
    int32_t *zero_point;
    int64_t width;  /* columns of a panel; 1 for rows */
    int64_t splits; /* parts of a unit */
    int32_t *highs; /* of each part, [splits, outer, inner], where there is more than one */
    uint32_t *lows;
};

/* Rows, or neighbouring columns: so many groups from `group` on, their elements from `start` on. */
struct unit {
    int64_t group, groups, outer, column;
};

static inline struct unit unit_at(const struct job *job, int64_t index)
{
    int64_t panels = (job->inner + job->width - 1) / job->width;
    int64_t outer = index / panels, column = index % panels * job->width, rest = job->inner - column;
    struct unit unit = {outer * job->inner + column, rest < job->width ? rest : job->width, outer, column};
    return unit;
}

static inline const void *source(const struct job *job, struct unit unit, int64_t position)
{
    int64_t offset = unit.outer * job->outer_stride + position * job->n_stride + unit.column;
    return element(job->x, offset, job->dtype);
}

static inline uint8_t *target(const struct job *job, struct unit unit, int64_t position)
{
    return job->values + (unit.outer * job->n + position) * job->inner + unit.column;
}

/* `length` elements from `from` on as FP32, each times the factor of its position, in `wide` or where they are. */
static inline const float *floats(const struct job *job, const void *from, int64_t position, int64_t length,
                                  int row, float *restrict wide)
{
    const float *factor = job->factor;
    if (job->dtype == FLOAT32 && !factor)
        return from;
    load_floats(wide, from, length, job->dtype);
    if (factor)
        for (int64_t i = 0; i < length; i++)
            wide[i] *= factor[position + (row ? i : 0)];
    return wide;
}

static void widen_ranges(const struct job *job, int32_t *high, uint32_t *low, const float *x, int64_t length,
                         int row)
{
    if (!job->symmetric)
        row ? widen_range(high, low, x, length, 1, 0, 0) : widen_range(high, low, x, length, 0, 0, 0);
    else if (!job->propagate)
        row ? widen_range(high, low, x, length, 1, 1, 0) : widen_range(high, low, x, length, 0, 1, 0);
    else
        row ? widen_range(high, low, x, length, 1, 1, 1) : widen_range(high, low, x, length, 0, 1, 1);
}

/* The ranges of a unit's groups over positions `first` to `last`. */
static void find_ranges(const struct job *job, struct unit unit, int64_t first, int64_t last, int32_t *high,
                        uint32_t *low)
{
    float wide[BLOCK];
    int row = job->inner == 1;
    memset(high, 0, unit.groups * sizeof *high);
    memset(low, 0, unit.groups * sizeof *low);
    for (int64_t position = first; position < last; position += row ? BLOCK : 1) {
        int64_t rest = last - position, length = !row ? unit.groups : rest < BLOCK ? rest : BLOCK;
        const float *x = floats(job, source(job, unit, position), position, length, row, wide);
        widen_ranges(job, high, low, x, length, row);
    }
}

/* The inverse scale and the zero point of each group; `store` keeps scale and zero point as results. */
static void find_scales(const struct job *job, struct unit unit, const int32_t *high, const uint32_t *low,
                        float *inverse, float *zero, int store)
{
    float scale[PANEL];
    for (int64_t i = 0; i < unit.groups; i++) {
        float highest = float_of(high[i]);
        if (job->symmetric) {
            find_symmetric_scale(high[i], &scale[i], &inverse[i]);
            zero[i] = 0;
        } else {
            float lowest = low[i] >> 31 ? float_of(low[i]) : 0;
            /* Each end is divided by itself: their difference may exceed the largest FP32 number. */
            float span = highest / 255 - lowest / 255;
            scale[i] = span < SMALLEST_SCALE ? SMALLEST_SCALE : span;
            inverse[i] = 1 / scale[i];
            zero[i] = (-128 - lowest * inverse[i]) + UNIT_ROUNDER - UNIT_ROUNDER;
        }
    }
    for (int64_t i = 0; store && i < unit.groups; i++) {
        job->scale[unit.group + i] = scale[i];
        if (!job->symmetric)
            job->zero_point[unit.group + i] = zero[i];
    }
}

static void round_floats(const struct job *job, uint8_t *out, const float *x, const float *inverse,
                         const float *zero, const uint16_t *noise, int64_t length, int row)
{
    float lowest = job->symmetric ? -127 : -128, rounder = job->rounder;
    if (noise)
        row ? round_each(out, x, inverse, zero, noise, length, 1, lowest, rounder)
            : round_each(out, x, inverse, zero, noise, length, 0, lowest, rounder);
    else if (!job->propagate)
        row ? round_each(out, x, inverse, zero, 0, length, 1, lowest, rounder)
            : round_each(out, x, inverse, zero, 0, length, 0, lowest, rounder);
    else
        row ? round_inside(out, x, inverse, length, 1, rounder) : round_inside(out, x, inverse, length, 0, rounder);
}

/* Rounds a unit's positions `first`, a multiple of 8, to `last`. */
static void round_unit(const struct job *job, struct unit unit, int64_t first, int64_t last,
                       const float *inverse, const float *zero)
{
    float wide[BLOCK];
    uint16_t noise[8][PANEL]; /* of a row BLOCK elements, the same number */
    int row = job->inner == 1;
    for (int64_t position = first; position < last; position += row ? BLOCK : 1) {
        int64_t rest = last - position, length = !row ? unit.groups : rest < BLOCK ? rest : BLOCK;
        const float *x = floats(job, source(job, unit, position), position, length, row, wide);
        if (job->seed && row)
            row_noise(noise[0], unit.group, position, length, *job->seed);
        else if (job->seed && position % 8 == 0)
            column_noise(noise, unit.group, unit.groups, position, *job->seed);
        const uint16_t *bits = job->seed ? noise[row ? 0 : position % 8] : 0;
        round_floats(job, target(job, unit, position), x, inverse, zero, bits, length, row);
    }
}

static void quantize_unit(const struct job *job, int64_t index)
{
    struct unit unit = unit_at(job, index);
    int32_t high[PANEL];
    uint32_t low[PANEL];
    float inverse[PANEL], zero[PANEL];
    find_ranges(job, unit, 0, job->n, high, low);
    find_scales(job, unit, high, low, inverse, zero, 1);
    round_unit(job, unit, 0, job->n, inverse, zero);
}

/* Part `index` of all: the unit, and its positions from *first to *last, a multiple of 8 each but the end. */
static struct unit part_at(const struct job *job, int64_t index, int64_t *first, int64_t *last)
{
    int64_t length = ((job->n + job->splits - 1) / job->splits + 7) / 8 * 8, split = index % job->splits;
    *first = split * length < job->n ? split * length : job->n;
    *last = (split + 1) * length < job->n ? (split + 1) * length : job->n;
    return unit_at(job, index / job->splits);
}

static void find_part_ranges(const struct job *job, int64_t index)
{
    int64_t first, last, kept = index % job->splits * job->outer * job->inner;
    struct unit unit = part_at(job, index, &first, &last);
    find_ranges(job, unit, first, last, job->highs + kept + unit.group, job->lows + kept + unit.group);
}

static void round_part(const struct job *job, int64_t index)
{
    int64_t first, last;
    struct unit unit = part_at(job, index, &first, &last);
    int32_t high[PANEL] = {0};
    uint32_t low[PANEL] = {0};
    float inverse[PANEL], zero[PANEL];
    for (int64_t split = 0; split < job->splits; split++) {
        int64_t kept = split * job->outer * job->inner + unit.group;
        for (int64_t i = 0; i < unit.groups; i++) {
            high[i] = job->highs[kept + i] > high[i] ? job->highs[kept + i] : high[i];
            low[i] = job->lows[kept + i] > low[i] ? job->lows[kept + i] : low[i];
        }
    }
    find_scales(job, unit, high, low, inverse, zero, first == 0);
    round_unit(job, unit, first, last, inverse, zero);
}

/* x [outer, n, inner] to int8 along n, with a scale and, where not `symmetric`, a zero point for each group. Panels of
 * `width` columns, or rows, are split in `splits` parts, for whose ranges `highs` and `lows` have room. */
void quantize(const void *x, int dtype, int64_t outer, int64_t n, int64_t inner, int64_t outer_stride,
              int64_t n_stride, const float *factor, const uint64_t *seed, int symmetric, int propagate,
              int is_unsigned, void *values, float *scale, int32_t *zero_point, int64_t width, int64_t splits,
              int32_t *highs, uint32_t *lows)
{
    struct job job = {x, dtype, outer, n, inner, outer_stride, n_stride, factor, seed, symmetric, propagate,
                      UNIT_ROUNDER + (is_unsigned ? 128 : 0), values, scale, zero_point, width, splits, highs, lows};
    int64_t units = outer * ((inner + width - 1) / width), parts = units * splits;
    if (splits == 1) {
#pragma omp parallel for schedule(static) if (outer * n * inner > SMALL)
        for (int64_t index = 0; index < units; index++)
            quantize_unit(&job, index);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t index = 0; index < parts; index++)
        find_part_ranges(&job, index);
#pragma omp parallel for schedule(static)
    for (int64_t index = 0; index < parts; index++)
        round_part(&job, index);
}
