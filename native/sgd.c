/* SGD: mixft/cpu/sgd.py. */
#include "optimizer_step.h"

struct sgd {
    float lr, momentum, one_minus_dampening, weight_decay;
    int nesterov;
    const struct step *step;
};

/* Without decay an infinite weight makes no NaN of the gradient. */
INLINE float decayed(struct sgd rule, float weight, float grad)
{
    return rule.weight_decay == 0 ? grad : grad + rule.weight_decay * weight;
}

INLINE void sgd_rule(struct sgd rule, float *weights, const float *grads, float factor, float *buffer,
                     int64_t length, int begins)
{
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
        float g = decayed(rule, weights[i], grads[i] * factor);
        float b = begins ? g : rule.momentum * buffer[i] + rule.one_minus_dampening * g;
        buffer[i] = b;
        weights[i] -= rule.lr * (rule.nesterov ? g + rule.momentum * b : b);
    }
}

static inline void update(const void *rule, int64_t tensor, float *weights, const float *grads, float factor,
                          float *const states[STATES], int64_t length)
{
    struct sgd sgd = *(const struct sgd *)rule;
    float *buffer = states[0];
    if (buffer && *sgd.step->steps[tensor] == 1)
        sgd_rule(sgd, weights, grads, factor, buffer, length, 1);
    else if (buffer)
        sgd_rule(sgd, weights, grads, factor, buffer, length, 0);
    else
#pragma omp simd
        for (int64_t i = 0; i < length; i++)
            weights[i] -= sgd.lr * decayed(sgd, weights[i], grads[i] * factor);
}

static void sgd_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct sgd *rule = context;
    step_block(rule->step, update, rule, tensor, start, length);
}

/* One step of SGD; a tensor at its first step takes its gradient as its momentum buffer. */
void sgd_step(const struct step *step, double lr, double momentum, double dampening, double weight_decay, int nesterov)
{
    advance_steps(step);
    struct sgd rule = {lr, momentum, 1 - dampening, weight_decay, nesterov, step};
    for_each_block(step->sizes, step->count, sgd_block, &rule);
}
