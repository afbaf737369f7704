/* Lion: mixft/cpu/lion.py. */
#include "optimizer_step.h"

struct lion {
    float lr, decay, one_minus_beta1, one_minus_beta2;
    const struct step *step;
};

static inline void update(const void *rule, int64_t tensor, float *weights, const float *grads, float factor,
                          float *const states[STATES], int64_t length)
{
    struct lion lion = *(const struct lion *)rule;
    float *exp_avg = states[0];
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
        float g = grads[i] * factor, m = exp_avg[i];
        float direction = m + lion.one_minus_beta1 * (g - m);
        /* A NaN has no sign, and is to stay one. */
        float sign = direction > 0 ? 1 : direction < 0 ? -1 : direction;
        weights[i] = weights[i] * lion.decay - lion.lr * sign;
        exp_avg[i] = m + lion.one_minus_beta2 * (g - m);
    }
}

static void lion_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct lion *rule = context;
    step_block(rule->step, update, rule, tensor, start, length);
}

/* One step of Lion. */
void lion_step(const struct step *step, double lr, double beta1, double beta2, double weight_decay)
{
    advance_steps(step);
    struct lion rule = {lr, 1 - lr * weight_decay, 1 - beta1, 1 - beta2, step};
    for_each_block(step->sizes, step->count, lion_block, &rule);
}
