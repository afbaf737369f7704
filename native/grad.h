#ifndef MIXFT_GRAD_H
#define MIXFT_GRAD_H

#include <stdint.h>

/* Per tensor: sum of squares and number of NaN and Inf. `partial` has room for one number a block; the sums are
 * added in the order of the blocks, whatever the number of threads. */
void gradient_statistics(void **grads, const int64_t *sizes, const int32_t *dtypes, int64_t count, double *partial,
                         float *squares, int64_t *nonfinite);

#endif
