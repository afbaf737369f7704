/* A linear layer with an int8 weight whose input is quantized on the way: mixft/cpu/int8_layer.py.
 *
 * Compiled for AVX512-VNNI in every build; only processors that have it get here.
 */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "activation.h"
#include "blocks.h"
#include "floats.h"
#include "int8_tile.h"

#define SMALLEST_SCALE 0x1p-126f

struct layer {
    const void *input, *bias;
    const uint8_t *weight;     /* packed */
    const float *weight_scale;
    const int32_t *weight_sum; /* of a static layer */
    void *out;
    int64_t inner, columns;
    int input_dtype, bias_dtype, out_dtype, activation;
    float input_scale; /* of a static layer */
    int32_t zero_point;
    int8_t *values; /* the quantized input, [rows, stride] */
    float *row_scale;
    int32_t *row_sum;
    int64_t stride;
};

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline __mmask16 first(int64_t count)
{
    return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

/* The larger of `high` and the largest magnitude; NaN counts as larger than infinity. */
static float magnitude(const float *values, int64_t length, float high)
{
    int32_t largest = bits_of(high);
    for (int64_t i = 0; i < length; i++) {
        int32_t bits = bits_of(values[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

/* round(values * inverse + zero_point), ties to even, clamped to int8; NaN counts as zero. Returns the sum. */
static int32_t round_values(int8_t *out, const float *values, int64_t length, float inverse, float zero_point)
{
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < length; i += LANES) {
        __mmask16 valid = first(length - i);
        __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, values + i), _mm512_set1_ps(inverse));
        y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y);
        y = _mm512_add_ps(y, _mm512_set1_ps(zero_point));
        y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(-128)), _mm512_set1_ps(127));
        __m512i rounded = _mm512_maskz_cvtps_epi32(valid, y);
        sums = _mm512_add_epi32(sums, rounded);
        _mm_mask_storeu_epi8(out + i, valid, _mm512_cvtepi32_epi8(rounded));
    }
    return _mm512_reduce_add_epi32(sums);
}

/* `length` values of a row as FP32: where they are, or in `buffer`. */
static inline const float *as_floats(float *buffer, const void *row, int64_t start, int64_t length, int dtype)
{
    if (dtype == FLOAT32)
        return (const float *)row + start;
    load_floats(buffer, element(row, start, dtype), length, dtype);
    return buffer;
}

static void quantize_row(const struct layer *layer, int64_t row)
{
    int64_t inner = layer->inner;
    int dtype = layer->input_dtype;
    const void *input = element(layer->input, row * inner, dtype);
    int8_t *values = layer->values + row * layer->stride;
    float buffer[BLOCK], scale = layer->input_scale, inverse = 1 / scale;
    uint32_t sum = 0;
    if (!layer->weight_sum) {
        float high = 127 * SMALLEST_SCALE;
        for (int64_t start = 0; start < inner; start += BLOCK) {
            int64_t length = least(inner - start, BLOCK);
            high = magnitude(as_floats(buffer, input, start, length, dtype), length, high);
        }
        scale = high / 127;
        inverse = 127 / high;
    }
    for (int64_t start = 0; start < inner; start += BLOCK) {
        int64_t length = least(inner - start, BLOCK);
        const float *floats = as_floats(buffer, input, start, length, dtype);
        sum += round_values(values + start, floats, length, inverse, layer->zero_point);
    }
    memset(values + inner, 0, QUAD);
    layer->row_scale[row] = scale;
    layer->row_sum[row] = 128 * sum;
}

/* Half a strip of one row: FP32 of the exact sums, scaled, with the bias. */
static inline __m512 scaled(__m512i sums, __m512i excess, __m512 column_scale, float row_scale, __m512 bias)
{
    __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, excess));
    return _mm512_fmadd_ps(_mm512_mul_ps(exact, column_scale), _mm512_set1_ps(row_scale), bias);
}

static void do_tile(const void *arguments, int64_t row, int64_t rows, int64_t strip)
{
    const struct layer *layer = arguments;
    int64_t column = strip * STRIP, count = least(layer->columns - column, STRIP);
    int dtype = layer->out_dtype, as_it_is = dtype == FLOAT32 && layer->activation == NONE;
    int32_t sums[TILE_ROWS * STRIP];
    float bias[STRIP] = {0}, wide[STRIP];
    __m512i excess[2];
    __m512 scale[2];
    multiply_tile(sums, layer->values + row * layer->stride, layer->stride,
                  layer->weight + strip * strip_bytes(layer->inner), layer->inner, rows);
    if (layer->bias)
        load_floats(bias, element(layer->bias, column, layer->bias_dtype), count, layer->bias_dtype);
    for (int half = 0; half < 2; half++) {
        int64_t start = half * LANES;
        __mmask16 valid = first(count - start);
        scale[half] = _mm512_maskz_loadu_ps(valid, layer->weight_scale + column + start);
        excess[half] = _mm512_setzero_si512();
        if (layer->weight_sum)
            excess[half] = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(valid, layer->weight_sum + column + start),
                                              _mm512_set1_epi32(layer->zero_point));
    }
    for (int64_t end = row + rows, at = 0; row < end; row++, at += STRIP) {
        void *out = element(layer->out, row * layer->columns + column, dtype);
        for (int half = 0; half < 2; half++) {
            int64_t start = half * LANES;
            __m512i all = _mm512_add_epi32(excess[half], _mm512_set1_epi32(layer->row_sum[row]));
            __m512 y = scaled(_mm512_loadu_si512(sums + at + start), all, scale[half], layer->row_scale[row],
                              _mm512_loadu_ps(bias + start));
            _mm512_mask_storeu_ps(as_it_is ? (float *)out + start : wide + start,
                                  as_it_is ? first(count - start) : 0xFFFF, y);
        }
        if (!as_it_is) {
            activate(wide, STRIP, layer->activation);
            store_floats(out, wide, count, dtype);
        }
    }
}

/* out [rows, columns] = act(s * weight_scale * ((q - zero_point) w^T) + bias) with input [rows, inner] =
 * s (q - zero_point): a static layer, with a weight_sum, has its s from `input_scale`; a dynamic one finds it in each row, with
 * no zero point. `weight` is packed, and `scratch` has room for inner + 144 bytes a row. */
void int8_linear(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                 const uint8_t *weight, const float *weight_scale, const int32_t *weight_sum, float input_scale,
                 int zero_point, const void *bias, int bias_dtype, int activation, void *out, int out_dtype,
                 void *scratch)
{
    struct layer layer = {input,       bias,       weight,    weight_scale, weight_sum,  out,       inner, columns,
                          input_dtype, bias_dtype, out_dtype, activation,   input_scale, zero_point};
    /* An odd number of cache lines, or the rows of a tile would displace each other from the first-level cache. */
    layer.stride = parts_of(inner + QUAD, 64) * 64 | 64;
    layer.values = scratch;
    layer.row_scale = (float *)(layer.values + rows * layer.stride);
    layer.row_sum = (int32_t *)(layer.row_scale + rows);
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        quantize_row(&layer, row);
    for_each_tile(rows, inner, columns, do_tile, &layer);
}

/* The four bytes from `from` on as unsigned ones, w + 128. */
static inline uint32_t unsigned_quad(const int8_t *from, int64_t count)
{
    uint32_t quad = 0;
    memcpy(&quad, from, count);
    return quad ^ 0x80808080;
}

/* `weight` [columns, inner] in the strips of int8_tile.h. */
void pack_int8_weight(uint8_t *packed, const int8_t *weight, int64_t columns, int64_t inner)
{
    int64_t bytes = strip_bytes(inner), whole = inner / QUAD;
#pragma omp parallel for schedule(static) if (columns * inner > SMALL)
    for (int64_t strip = 0; strip < parts_of(columns, STRIP); strip++) {
        uint32_t *out = (uint32_t *)(packed + strip * bytes);
        memset(out, 0, bytes);
        for (int64_t column = strip * STRIP; column < least(columns, (strip + 1) * STRIP); column++, out++) {
            const int8_t *row = weight + column * inner;
            for (int64_t quad = 0; quad < whole; quad++)
                out[quad * STRIP] = unsigned_quad(row + quad * QUAD, QUAD);
            if (inner % QUAD)
                out[whole * STRIP] = unsigned_quad(row + whole * QUAD, inner % QUAD);
        }
    }
}
