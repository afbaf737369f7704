/* The frame of the optimizer steps: whatever the dtypes, a rule sees blocks of FP32: mixft/cpu/compiled_step.py. */
#ifndef MIXFT_OPTIMIZER_STEP_H
#define MIXFT_OPTIMIZER_STEP_H

#include "optimizer_state.h"

#define STATES 3

enum { NO_MASTERS, FULL_MASTERS, REMAINDERS };
enum { FULL_STATE, BFLOAT16_STATE, CODES };

/* One step of `count` tensors; lists that are not needed are NULL. StepTensors in mixft/cpu/compiled_step.py is the
 * same in Python. */
struct step {
    int64_t count;
    const int64_t *sizes;
    const int32_t *param_dtypes, *grad_dtypes;
    void **params, **grads, **masters;
    float **steps;            /* the steps taken, this one included */
    void **states[STATES];    /* the first moments first, then the second ones */
    uint8_t **scales[STATES]; /* of codes */
    int32_t masters_format, state_format, stochastic_rounding;
    float factor; /* of the gradients */
};

/* Updates weights and states in place; `states` that the rule does not have are NULL. */
typedef void update_function(const void *rule, int64_t tensor, float *weights, const float *grads, float factor,
                             float *const states[STATES], int64_t length);

/* a + weight (b - a), from the nearer of the two, as torch has it: at a weight of 1 it is b to the bit. */
INLINE float lerp(float a, float b, float weight)
{
    return weight < 0.5f ? a + weight * (b - a) : b - (1 - weight) * (b - a);
}

/* FP32 elements where they lie, or in `buffer` if they are narrower. */
INLINE float *as_floats(float *buffer, void *elements, int64_t length, int dtype)
{
    if (dtype == FLOAT32)
        return elements;
    load_floats(buffer, elements, length, dtype);
    return buffer;
}

INLINE float *load_weights(float *buffer, const struct step *step, int64_t tensor, int64_t start, int64_t length)
{
    int dtype = step->param_dtypes[tensor];
    void *params = element(step->params[tensor], start, dtype);
    if (step->masters_format == NO_MASTERS)
        return as_floats(buffer, params, length, dtype);
    if (step->masters_format == FULL_MASTERS)
        return (float *)step->masters[tensor] + start;
    join_weights(buffer, params, (int16_t *)step->masters[tensor] + start, length, dtype);
    return buffer;
}

INLINE void store_weights(float *weights, const struct step *step, int64_t tensor, int64_t start, int64_t length,
                          const uint32_t *phases, uint32_t count)
{
    int dtype = step->param_dtypes[tensor];
    void *params = element(step->params[tensor], start, dtype);
    if (step->masters_format == REMAINDERS)
        split_weights(params, (int16_t *)step->masters[tensor] + start, weights, length, dtype);
    else if (step->stochastic_rounding && dtype != FLOAT32)
        store_stochastically(params, weights, length, dtype, phases, count * PARAMETER);
    else if (params != weights)
        store_floats(params, weights, length, dtype);
}

INLINE float *load_state(float *buffer, const struct step *step, int number, int64_t tensor, int64_t start,
                         int64_t length)
{
    void *state = step->states[number][tensor];
    if (step->state_format != CODES) {
        int dtype = step->state_format == FULL_STATE ? FLOAT32 : BFLOAT16;
        return as_floats(buffer, element(state, start, dtype), length, dtype);
    }
    decode_codes(buffer, (uint8_t *)state + start, step->scales[number][tensor] + start / GROUP, length, number == 0);
    return buffer;
}

INLINE void store_state(float *values, const struct step *step, int number, int64_t tensor, int64_t start,
                        int64_t length, const uint32_t *phases, uint32_t count)
{
    void *state = step->states[number][tensor];
    uint32_t turn = count * (number == 0 ? FIRST_MOMENT : SECOND_MOMENT);
    if (step->state_format == CODES)
        encode_codes((uint8_t *)state + start, step->scales[number][tensor] + start / GROUP, values, length, phases,
                     turn, number == 0);
    else if (step->state_format == BFLOAT16_STATE)
        store_stochastically((uint16_t *)state + start, values, length, BFLOAT16, phases, turn);
}

/* Narrow elements of a later part: the processor itself, which sees only short runs of them, looks no further than a
 * page. Not beside FP32 state, whose longer runs it follows well. */
INLINE void fetch_part(const struct step *step, int64_t tensor, int64_t start)
{
    if (step->state_format == FULL_STATE || start + PART > step->sizes[tensor])
        return;
    int64_t state_bytes = step->state_format == CODES ? 1 : 2;
    for (int number = 0; number < STATES; number++)
        if (step->states[number])
            fetch((char *)step->states[number][tensor] + start * state_bytes, PART * state_bytes);
    if (step->param_dtypes[tensor] != FLOAT32)
        fetch((uint16_t *)step->params[tensor] + start, 2 * PART);
    if (step->grad_dtypes[tensor] != FLOAT32)
        fetch((uint16_t *)step->grads[tensor] + start, 2 * PART);
    if (step->masters_format == REMAINDERS)
        fetch((int16_t *)step->masters[tensor] + start, 2 * PART);
}

INLINE void step_part(const struct step *step, update_function update, const void *rule, int64_t tensor, int64_t start,
                      int64_t length)
{
    float weight_buffer[PART], grad_buffer[PART], buffers[STATES][PART];
    uint32_t phases[PART];
    float *states[STATES] = {0};
    uint32_t count = *step->steps[tensor];
    int grad_dtype = step->grad_dtypes[tensor];
    float *weights = load_weights(weight_buffer, step, tensor, start, length);
    float *grads = as_floats(grad_buffer, element(step->grads[tensor], start, grad_dtype), length, grad_dtype);
    for (int number = 0; number < STATES; number++)
        if (step->states[number])
            states[number] = load_state(buffers[number], step, number, tensor, start, length);
    fetch_part(step, tensor, start + 2 * PART);
    update(rule, tensor, weights, grads, step->factor, states, length);
    if (step->state_format != FULL_STATE || step->stochastic_rounding)
        fill_phases(phases, start, groups_of(length) * GROUP);
    for (int number = 0; number < STATES; number++)
        if (step->states[number])
            store_state(states[number], step, number, tensor, start, length, phases, count);
    store_weights(weights, step, tensor, start, length, phases, count);
}

INLINE void step_block(const struct step *step, update_function update, const void *rule, int64_t tensor, int64_t start,
                       int64_t length)
{
    /* A length that the compiler knows leaves no loop to be counted. */
    for (; length >= PART; start += PART, length -= PART)
        step_part(step, update, rule, tensor, start, PART);
    if (length)
        step_part(step, update, rule, tensor, start, length);
}

/* Counts this step in every tensor's. */
static inline void advance_steps(const struct step *step)
{
    for (int64_t tensor = 0; tensor < step->count; tensor++)
        *step->steps[tensor] += 1;
}

#endif
