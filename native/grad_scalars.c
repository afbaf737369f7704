/* What an optimizer step needs to know of its gradients: mixft/cpu/grad_scalars.py. */
#include <math.h>

#include "floats.h"
#include "grad.h"

/* Norm, clip coefficient and whether to skip the step, as in kernels/grad_scalars.py; `inv_scale`, `found_inf` and
 * `max_norm` are NULL where there is none. `partial` has room for one number a block, `squares` for one a tensor. */
void gradient_scalars(void **grads, const int64_t *sizes, const int32_t *dtypes, int64_t count, double *partial,
                      float *squares, const float *inv_scale, const float *found_inf, const double *max_norm,
                      float *scalars, int64_t *nonfinite)
{
    double total = 0, clip_coef = 1;
    int found = found_inf && *found_inf != 0;
    gradient_statistics(grads, sizes, dtypes, count, partial, squares, nonfinite);
    for (int64_t tensor = 0; tensor < count; tensor++) {
        total += squares[tensor];
        found |= nonfinite[tensor] != 0;
    }
    float norm = sqrtf(total);
    if (inv_scale)
        norm *= *inv_scale;
    if (max_norm) {
        /* A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking. */
        found |= is_nonfinite(norm);
        clip_coef = *max_norm / (norm + 1e-6);
        /* This way round a NaN stays. */
        clip_coef = clip_coef > 1 ? 1 : clip_coef;
    }
    scalars[0] = norm;
    scalars[1] = clip_coef;
    scalars[2] = found;
}
