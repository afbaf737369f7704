/* A linear layer with an int8 weight whose input is quantized on the way: mixft/cpu/int8_layer.py.
 *
 * Compiled for AVX512-VNNI in every build; only processors that have it get here.
 */
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "activation.h"
#include "int8_rows.h"

struct layer {
    const void *bias;
    const uint8_t *weight; /* packed */
    const float *weight_scale;
    const int32_t *weight_sum; /* of a static layer */
    void *out;
    int64_t inner, columns;
    int bias_dtype, out_dtype, activation;
    int32_t zero_point;
    struct low_rank added;
    struct quantized_rows quantized;
};

/* Half a strip of one row: FP32 of the exact sums, scaled, with the bias. */
static inline __m512 scaled(__m512i sums, __m512i excess, __m512 column_scale, float row_scale, __m512 bias)
{
    __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, excess));
    return _mm512_fmadd_ps(_mm512_mul_ps(exact, column_scale), _mm512_set1_ps(row_scale), bias);
}

static void do_tile(const void *arguments, int64_t row, int64_t rows, int64_t strip, int64_t place)
{
    const struct layer *layer = arguments;
    int64_t column = strip * STRIP, count = least(layer->columns - column, STRIP);
    int dtype = layer->out_dtype, as_it_is = dtype == FLOAT32 && layer->activation == NONE;
    int32_t sums[TILE_ROWS * STRIP];
    float bias[STRIP] = {0}, wide[STRIP];
    __m512i excess[2];
    __m512 scale[2];
    const struct quantized_rows *quantized = &layer->quantized;
    multiply_tile(sums, quantized->values + row * quantized->stride, quantized->stride,
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
            __m512i all = _mm512_add_epi32(excess[half], _mm512_set1_epi32(quantized->sum[row]));
            __m512 y = scaled(_mm512_loadu_si512(sums + at + start), all, scale[half], quantized->scale[row],
                              _mm512_loadu_ps(bias + start));
            y = with_low_rank(y, &layer->added, row, column + start, layer->columns);
            _mm512_mask_storeu_ps(as_it_is ? (float *)out + start : wide + start,
                                  as_it_is ? first(count - start) : 0xFFFF, y);
        }
        if (!as_it_is) {
            activate(wide, STRIP, layer->activation);
            store_floats(out, wide, count, dtype);
        }
    }
}

/* out [rows, columns] = act(s * weight_scale * ((q - zero_point) w^T) + bias + left right) with input [rows, inner] =
 * s (q - zero_point): a static layer, with a weight_sum, has its s from `input_scale`; a dynamic one finds it in each
 * row, with no zero point. `weight` is packed, left is [rows, rank] and right [rank, columns], and `scratch` has room
 * for inner + 144 bytes a row. */
void int8_linear(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                 const uint8_t *weight, const float *weight_scale, const int32_t *weight_sum, float input_scale,
                 int zero_point, const void *bias, int bias_dtype, int activation, const float *left,
                 const float *right, int64_t rank, void *out, int out_dtype, void *scratch)
{
    struct layer layer = {bias,       weight,    weight_scale, weight_sum, out,                 inner, columns,
                          bias_dtype, out_dtype, activation,   zero_point, {left, right, rank}};
    layer.quantized = rows_at(scratch, rows, inner);
#pragma omp parallel for schedule(static) if (rows * inner > SMALL)
    for (int64_t row = 0; row < rows; row++)
        quantize_row(&layer.quantized, row, input, input_dtype, inner, NULL, weight_sum ? input_scale : 0, zero_point);
    for_each_tile(rows, inner, columns, NULL, do_tile, &layer);
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
