#ifndef MIXFT_INLINE_H
#define MIXFT_INLINE_H

/* A function that is compiled into each of its callers, for the constants that they give it. */
#define INLINE static inline __attribute__((always_inline))

#endif
