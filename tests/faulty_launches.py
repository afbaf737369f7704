"""Launches with a fault each that neither the interpreter nor the compiler alone would show, and sound ones."""

import torch
import triton
import triton.language as tl


@triton.jit
def fill(values, number, BLOCK: tl.constexpr):
    tl.store(values + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), number)


@triton.jit
def hidden_argument(params, BLOCK: tl.constexpr):
    tl.store(params + tl.arange(0, BLOCK), 0.0)


VALUES = torch.empty(256)
LAUNCHES = {
    "sound": lambda: fill[(2,)](VALUES, 0.5, BLOCK=64),
    "another number": lambda: fill[(3,)](VALUES, 1.5, BLOCK=64),
    "another block": lambda: fill[(1, 2)](VALUES, 0.5, BLOCK=32, num_warps=1),
    "argument hidden by Triton": lambda: hidden_argument[(1,)](VALUES, BLOCK=64),
    "constexpr left out": lambda: fill[(1,)](VALUES, 0.5),
    "unknown option": lambda: fill[(1,)](VALUES, 0.5, BLOCK=64, warps=4),
    "no program": lambda: fill[(0,)](VALUES, 0.5, BLOCK=64),
    "too many programs": lambda: fill[(2**31,)](VALUES, 0.5, BLOCK=64),
    "too many programs in y": lambda: fill[(1, 65536)](VALUES, 0.5, BLOCK=64),
}
