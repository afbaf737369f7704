/* SGD: mixft/cpu/sgd.py. */
#include "optimizer_step.h"

struct sgd {
    float lr, momentum, one_minus_dampening, weight_decay;
    int nesterov;
    const struct step *step;
};

INLINE void sgd_rule(struct sgd rule, float *weights, const float *grads, float factor, float *buffer,
                     int64_t length, int begins)
{
    /* What the buffer and the gradient weigh in it, and what each weighs in the direction. */
    float kept = rule.momentum, added = rule.one_minus_dampening;
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
        float g = grads[i] * factor;
        g += rule.weight_decay * weights[i];
        float b = begins ? g : kept * buffer[i] + added * g;
        buffer[i] = b;
        weights[i] -= rule.lr * (rule.nesterov ? g + kept * b : b);
    }
}

static inline void update(const void *of, int64_t tensor, float *weights, const float *grads, float factor,
                          float *const states[STATES], int64_t length)
{
    struct sgd rule = *(const struct sgd *)of;
    float *buffer = states[0];
    if (buffer && *rule.step->steps[tensor] == 1)
        sgd_rule(rule, weights, grads, factor, buffer, length, 1);
    else if (buffer)
        sgd_rule(rule, weights, grads, factor, buffer, length, 0);
    else
#pragma omp simd
        for (int64_t i = 0; i < length; i++)
            weights[i] -= rule.lr * (grads[i] * factor + rule.weight_decay * weights[i]);
}

static void sgd_block(void *of, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct sgd *rule = of;
    step_block(rule->step, update, rule, tensor, start, length);
}

/* One step of SGD; a tensor at its first step takes its gradient as its momentum buffer. */
void sgd_step(const struct step *step, double lr, double momentum, double dampening, double weight_decay, int nesterov)
{
    advance_steps(step);
    struct sgd rule = {lr, momentum, 1 - dampening, weight_decay, nesterov, step};
    for_each_block(step->sizes, step->count, sgd_block, &rule);
}
