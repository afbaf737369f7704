"""The call of the compiled quantization, in as many parts as give every thread some work."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native

# Up to this many elements the calls cost more than the memory that they pass over.
SMALL = 1 << 16

# Bytes of a panel of columns, at most: half of a core's second-level cache, so that it is read from memory once.
CACHED = 1 << 19

# Elements of a part at least, where a unit is split.
PART = 1 << 14

compiled = native.Routine(
    "quantize", c_void_p, c_int, *[c_int64] * 5, *[c_void_p] * 2, *[c_int] * 3, *[c_void_p] * 3, *[c_int64] * 2,
    *[c_void_p] * 2,
)  # fmt: skip


def quantize_into(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    x: Tensor,
    symmetric: bool,
    seed: Tensor | None = None,
    factor: Tensor | None = None,
    propagate: bool = False,
) -> None:
    """Quantize ``x`` [outer, n, inner] along ``n`` into contiguous ``values``, ``scale`` and ``zero_point``.

    Where ``values`` is uint8, its bytes are those of int8 values plus 128.
    """
    outer, n, inner = x.shape
    if x.stride(1 if inner == 1 else 2) != 1:
        x = x.contiguous()
    width, splits = tiling(x)
    highs = lows = None
    if splits > 1:
        highs, lows = torch.empty((2, splits, outer, inner), dtype=torch.int32, device="cpu")
    compiled(
        *(*native.typed(x), outer, n, inner, x.stride(0), x.stride(1), native.address(factor), native.address(seed)),
        *(symmetric, propagate, values.dtype == torch.uint8),
        *(values.data_ptr(), scale.data_ptr(), zero_point.data_ptr()),
        *(width, splits, native.address(highs), native.address(lows)),
    )


def tiling(x: Tensor) -> tuple[int, int]:
    """Columns of a panel, and the parts that rows or panels are split into so that every thread has some."""
    outer, n, inner = x.shape
    width = inner
    if inner > 1:
        fitting = CACHED // (n * x.itemsize) // 64 * 64
        most = native.constant("quantize_panel")
        width = min(inner, fitting or most, most)
    if x.numel() <= SMALL:
        return width, 1
    units = outer * -(-inner // width)
    wanted = 4 * torch.get_num_threads()
    return width, 1 if units >= wanted else max(1, min(-(-wanted // units), n * width // PART))
