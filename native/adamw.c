/* AdamW and Adam: mixft/cpu/adamw.py. */
#include <math.h>

#include "optimizer_step.h"

struct adam {
    float decay, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps;
    int decoupled;
    const float *corrections; /* per tensor: the size of the step, and what the second moment's root is divided by */
};

struct job {
    const struct step *step;
    const struct adam *rule;
};

INLINE void adam_rule(struct adam rule, int64_t tensor, float *weights, const float *grads, float factor,
                      float *const states[STATES], int64_t length, int has_penalty, int has_maximum)
{
    float *exp_avg = states[0], *exp_avg_sq = states[1], *maximum = states[2];
    float step_size = rule.corrections[2 * tensor], root_factor = rule.corrections[2 * tensor + 1];
#pragma omp simd
    for (int64_t i = 0; i < length; i++) {
        float p = weights[i], g = grads[i] * factor, m = exp_avg[i], v = exp_avg_sq[i];
        if (has_penalty)
            g += rule.weight_decay * p;
        p *= rule.decay;
        m = lerp(m, g, rule.one_minus_beta1);
        v = rule.beta2 * v + rule.one_minus_beta2 * g * g;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        if (has_maximum)
            /* This way round a NaN stays. */
            v = maximum[i] = maximum[i] > v ? maximum[i] : v;
        weights[i] = p - step_size * m / (sqrtf(v) * root_factor + rule.eps);
    }
}

static inline void update(const void *rule, int64_t tensor, float *weights, const float *grads, float factor,
                          float *const states[STATES], int64_t length)
{
    struct adam adam = *(const struct adam *)rule;
    int has_penalty = !adam.decoupled && adam.weight_decay != 0;
    if (has_penalty && states[2])
        adam_rule(adam, tensor, weights, grads, factor, states, length, 1, 1);
    else if (has_penalty)
        adam_rule(adam, tensor, weights, grads, factor, states, length, 1, 0);
    else if (states[2])
        adam_rule(adam, tensor, weights, grads, factor, states, length, 0, 1);
    else
        adam_rule(adam, tensor, weights, grads, factor, states, length, 0, 0);
}

static void adam_block(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block)
{
    struct job *job = context;
    step_block(job->step, update, job->rule, tensor, start, length);
}

/* lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of every tensor; most have taken equally many steps. */
static void correct_bias(float *corrections, const struct step *step, double lr, double beta1, double beta2)
{
    float known = 0, step_size = 0, root_factor = 0;
    for (int64_t tensor = 0; tensor < step->count; tensor++) {
        float steps = *step->steps[tensor];
        if (steps != known) {
            step_size = lr / (1 - pow(beta1, steps));
            root_factor = 1 / sqrt(1 - pow(beta2, steps));
            known = steps;
        }
        corrections[2 * tensor] = step_size;
        corrections[2 * tensor + 1] = root_factor;
    }
}

/* One step of AdamW, or of Adam with an L2 penalty; `corrections` has room for two numbers a tensor. */
void adamw_step(const struct step *step, float *corrections, double lr, double beta1, double beta2, double eps,
                double weight_decay, int decoupled)
{
    advance_steps(step);
    correct_bias(corrections, step, lr, beta1, beta2);
    struct adam rule = {.decay = decoupled ? 1 - lr * weight_decay : 1,
                        .weight_decay = weight_decay,
                        .one_minus_beta1 = 1 - beta1,
                        .beta2 = beta2,
                        .one_minus_beta2 = 1 - beta2,
                        .eps = eps,
                        .decoupled = decoupled,
                        .corrections = corrections};
    struct job job = {step, &rule};
    for_each_block(step->sizes, step->count, adam_block, &job);
}
