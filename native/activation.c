/* What follows a matrix product: mixft/cpu/activation.py. */
#include "activation.h"
#include "blocks.h"

struct arguments {
    const void *product, *residual;
    void *out, *preactivation;
    int product_dtype, residual_dtype, out_dtype, preactivation_dtype, activation;
};

static void finish_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct arguments *to = of;
    float values[BLOCK], added[BLOCK];
    load_floats(values, element(to->product, start, to->product_dtype), length, to->product_dtype);
    if (to->preactivation)
        store_floats(element(to->preactivation, start, to->preactivation_dtype), values, length,
                     to->preactivation_dtype);
    activate(values, length, to->activation);
    if (to->residual) {
        load_floats(added, element(to->residual, start, to->residual_dtype), length, to->residual_dtype);
        for (int64_t i = 0; i < length; i++)
            values[i] += added[i];
    }
    store_floats(element(to->out, start, to->out_dtype), values, length, to->out_dtype);
}

/* out = activation(product) + residual, and preactivation = product, each rounded once. All have `size` elements in one
 * order; `residual` and `preactivation` may be null, and `out` may be `product` where the dtypes are the same. */
void finish_product(const void *product, int product_dtype, int64_t size, int activation, const void *residual,
                    int residual_dtype, void *out, int out_dtype, void *preactivation, int preactivation_dtype)
{
    struct arguments to = {product, residual, out, preactivation, product_dtype, residual_dtype, out_dtype,
                           preactivation_dtype, activation};
    for_each_block(&size, 1, finish_block, &to);
}
