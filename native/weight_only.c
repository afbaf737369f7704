/* Few rows of floats times an int8 weight, which is widened in registers: mixft/cpu/int8_matmul.py. */
#include <omp.h>

#include "activation.h"
#include "floats.h"
#include "inline.h"

/* A tile of the product is of 1 to TILE_ROWS rows; its sums stay in as many registers as there are for them. */
#ifdef __AVX512F__
enum { LANES = 16, SUMS = 16 };
typedef __m512 vector;
#else
enum { LANES = 8, SUMS = 8 };
typedef __m256 vector;
#endif
enum { TILE_ROWS = 4, MOST_COLUMNS = 8 };

/* Columns of the output done at a time. */
enum { STRIP = 32 };

/* Up to this many products a second thread costs more than it does. */
#define SMALL_PRODUCT (1 << 18)

struct product {
    const float *input; /* [rows, stride], zeros from `inner` on */
    const int8_t *weight;
    const float *scale;
    const void *bias;
    void *out;
    int64_t rows, inner, columns, stride;
    int bias_dtype, out_dtype, activation;
};

static inline vector widened(const int8_t *weight)
{
#ifdef __AVX512F__
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)weight)));
#else
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)weight)));
#endif
}

static inline vector multiplied(const float *input, vector weight, vector sum)
{
#ifdef __AVX512F__
    return _mm512_fmadd_ps(_mm512_loadu_ps(input), weight, sum);
#else
    return _mm256_fmadd_ps(_mm256_loadu_ps(input), weight, sum);
#endif
}

static inline float total(vector sums)
{
    float lanes[LANES];
    memcpy(lanes, &sums, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++)
            lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* sums [rows, STRIP] of `rows` rows with `columns` rows of the weight; what lies `ahead` of those is fetched. */
INLINE void multiply(float *sums, const float *input, const int8_t *weight, int64_t inner, int64_t stride,
                     int64_t ahead, const int rows, const int columns)
{
    vector sum[TILE_ROWS][MOST_COLUMNS] = {0};
    int64_t whole = inner / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES)
#pragma GCC unroll 8
        for (int column = 0; column < columns; column++) {
            _mm_prefetch(weight + column * inner + k + ahead, _MM_HINT_T0);
            vector wide = widened(weight + column * inner + k);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++)
                sum[row][column] = multiplied(input + row * stride + k, wide, sum[row][column]);
        }
    if (whole < inner)
        for (int column = 0; column < columns; column++) {
            int8_t rest[LANES] = {0};
            memcpy(rest, weight + column * inner + whole, inner - whole);
            for (int row = 0; row < rows; row++)
                sum[row][column] = multiplied(input + row * stride + whole, widened(rest), sum[row][column]);
        }
    for (int column = 0; column < columns; column++)
        for (int row = 0; row < rows; row++)
            sums[row * STRIP + column] = total(sum[row][column]);
}

/* `at_once` columns after the other. While the first rows pass, the next columns are fetched from memory. */
INLINE void multiply_strip(float *sums, const float *input, const int8_t *weight, int64_t inner, int64_t stride,
                           int64_t columns, int first, const int rows, const int at_once)
{
    int64_t column = 0, ahead = first ? at_once * inner : 0;
    for (; column + at_once <= columns; column += at_once)
        multiply(sums + column, input, weight + column * inner, inner, stride, ahead, rows, at_once);
    for (; column < columns; column++)
        multiply(sums + column, input, weight + column * inner, inner, stride, 0, rows, 1);
}

static void do_strip(const struct product *product, int64_t column)
{
    int64_t inner = product->inner, stride = product->stride, rest = product->columns - column;
    int64_t columns = rest < STRIP ? rest : STRIP;
    const int8_t *weight = product->weight + column * inner;
    float bias[STRIP] = {0}, sums[TILE_ROWS * STRIP] = {0};
    if (product->bias)
        load_floats(bias, element(product->bias, column, product->bias_dtype), columns, product->bias_dtype);
    for (int64_t first = 0; first < product->rows; first += TILE_ROWS) {
        int64_t rows = product->rows - first;
        const float *input = product->input + first * stride;
        switch (rows) {
        case 1: multiply_strip(sums, input, weight, inner, stride, columns, !first, 1, MOST_COLUMNS); break;
        case 2: multiply_strip(sums, input, weight, inner, stride, columns, !first, 2, SUMS / 2); break;
        case 3: multiply_strip(sums, input, weight, inner, stride, columns, !first, 3, SUMS / 4); break;
        default: multiply_strip(sums, input, weight, inner, stride, columns, !first, 4, SUMS / 4); rows = TILE_ROWS;
        }
        for (int64_t row = 0; row < rows; row++) {
            float *y = sums + row * STRIP;
            for (int64_t i = 0; i < columns; i++)
                y[i] = y[i] * product->scale[column + i] + bias[i];
            activate(y, columns, product->activation);
            store_floats(element(product->out, (first + row) * product->columns + column, product->out_dtype), y,
                         columns, product->out_dtype);
        }
    }
}

const int32_t weight_only_padding = LANES;

/* out [rows, columns] = act(scale * (input weight^T) + bias), the sums in FP32: input [rows, inner] floats, weight
 * int8 [columns, inner]. `scratch` has room for rows * (inner + weight_only_padding)
 * FP32 numbers. */
void weight_only_product(const void *input, int input_dtype, int64_t rows, int64_t inner, int64_t columns,
                         const int8_t *weight, const float *scale, const void *bias, int bias_dtype, int activation,
                         void *out, int out_dtype, float *scratch)
{
    int64_t stride = inner + LANES;
    for (int64_t row = 0; row < rows; row++) {
        load_floats(scratch + row * stride, element(input, row * inner, input_dtype), inner, input_dtype);
        memset(scratch + row * stride + inner, 0, LANES * sizeof(float));
    }
    struct product product = {scratch, weight,  scale,  bias,       out,       rows,
                              inner,   columns, stride, bias_dtype, out_dtype, activation};
#pragma omp parallel for schedule(static) if (rows * inner * columns > SMALL_PRODUCT)
    for (int64_t column = 0; column < columns; column += STRIP)
        do_strip(&product, column);
}
