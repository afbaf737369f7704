/* What follows a matrix product: mixft/cpu/activation.py. */
#include "activation.h"
#include "blocks.h"

struct job {
    const void *product, *residual;
    void *out, *preactivation;
    int product_dtype, residual_dtype, out_dtype, preactivation_dtype, activation;
};

static void finish_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    float values[BLOCK], added[BLOCK];
    load_floats(values, element(job->product, start, job->product_dtype), length, job->product_dtype);
    if (job->preactivation)
        store_floats(element(job->preactivation, start, job->preactivation_dtype), values, length,
                     job->preactivation_dtype);
    activate(values, length, job->activation);
    if (job->residual) {
        load_floats(added, element(job->residual, start, job->residual_dtype), length, job->residual_dtype);
        for (int64_t i = 0; i < length; i++)
            values[i] += added[i];
    }
    store_floats(element(job->out, start, job->out_dtype), values, length, job->out_dtype);
}

/* out = activation(product) + residual, and preactivation = product, each rounded once. All have `size` elements in one
 * order; `residual` and `preactivation` may be null, and `out` may be `product` where the dtypes are the same. */
void finish_product(const void *product, int product_dtype, int64_t size, int activation, const void *residual,
                    int residual_dtype, void *out, int out_dtype, void *preactivation, int preactivation_dtype)
{
    struct job job = {product, residual, out, preactivation, product_dtype, residual_dtype, out_dtype,
                      preactivation_dtype, activation};
    for_each_block(&size, 1, finish_block, &job);
}
