/* One parallel loop over the elements of any number of tensors, a block at a time. */
#ifndef MIXFT_BLOCKS_H
#define MIXFT_BLOCKS_H

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

#include "inline.h"

/* Elements of a block: 4 KB as FP32, so that a few buffers of it stay in the first-level cache. */
#define BLOCK 1024

/* Elements worked on at a time where they are converted: few enough for the processor to look beyond them, and to read
 * the next ones meanwhile. */
#define PART 256

/* Up to this many elements a second thread costs more than it does. */
#define SMALL 32768

/* Does `length` elements of tensor `tensor` from `start` on; `block` counts the blocks of all tensors before. */
typedef void block_function(void *context, int64_t tensor, int64_t start, int64_t length, int64_t block);

static inline int64_t blocks_of(int64_t size)
{
    return (size + BLOCK - 1) / BLOCK;
}

static inline int64_t blocks_of_all(const int64_t *sizes, int64_t count)
{
    int64_t blocks = 0;
    for (int64_t tensor = 0; tensor < count; tensor++)
        blocks += blocks_of(sizes[tensor]);
    return blocks;
}

/* Asks for elements ahead of their turn, into the second-level cache: the first one would soon overflow. */
INLINE void fetch(const void *elements, int64_t bytes)
{
    for (int64_t line = 0; line < bytes; line += 64)
        _mm_prefetch((const char *)elements + line, _MM_HINT_T1);
}

/* Blocks `first` up to `last`, of those of all tensors. */
INLINE void do_blocks(const int64_t *sizes, int64_t count, int64_t first, int64_t last, block_function body,
                      void *context)
{
    int64_t passed = 0;
    for (int64_t tensor = 0; tensor < count && passed < last; tensor++) {
        int64_t size = sizes[tensor], of_tensor = blocks_of(size);
        int64_t begin = first > passed ? first - passed : 0;
        int64_t end = last - passed < of_tensor ? last - passed : of_tensor;
        for (int64_t index = begin; index < end; index++) {
            int64_t start = index * BLOCK, rest = size - start;
            body(context, tensor, start, rest < BLOCK ? rest : BLOCK, passed + index);
        }
        passed += of_tensor;
    }
}

/* Every block of every tensor once, each thread a run of neighbours. */
INLINE void for_each_block(const int64_t *sizes, int64_t count, block_function body, void *context)
{
    int64_t blocks = blocks_of_all(sizes, count);
#pragma omp parallel if (blocks * BLOCK > SMALL)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
        do_blocks(sizes, count, first, last, body, context);
    }
}

#endif
