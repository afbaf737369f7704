"""A layer with an int8 weight in one compiled call, from its input in floats to its output.

Each row of the input is quantized before the product, which is exact in int32 and reads the weight where it lies: see
native/int8_product.h, which is written for every processor that mixft has compiled routines for.
"""

import functools
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .activation import CODES
from .instruction_set import has_amx

linear = native.Routine(
    "int8_linear",
    *(c_void_p, c_int, c_int64, c_int64, c_int64),
    *(c_void_p, c_void_p, c_void_p, c_float, c_int),
    *(c_void_p, c_int, c_int, c_void_p, c_void_p, c_int64, c_void_p, c_int, c_void_p, c_void_p),
)

# Input rows from which on oneDNN is faster, on a processor with AMX.
AMX_ROWS = 32


def serves(rows: int) -> bool:
    """Whether the compiled layer is exact here and, for ``rows`` input rows, the fastest there is."""
    return is_exact() and not (rows >= AMX_ROWS and has_amx())


@functools.cache
def _layout() -> tuple[int, int, int, int, int]:
    """Rows of a weight in a strip, bytes of each that lie together in it, bytes of the strips that a thread packs at a
    time, bytes of a value of the input, and those that a row of it takes beside."""
    names = ("int8_strip", "int8_depth", "int8_group_bytes", "int8_row_value_bytes", "int8_row_bytes")
    return tuple(map(native.constant, names))


def room_for(M: int, K: int) -> tuple[Tensor, int, int]:
    """Memory that a compiled product works in, to be held until it returns, and its last two arguments: where in it
    threads pack strips of a weight of depth ``K``, and where ``M`` rows are quantized."""
    strip, depth, group_bytes, value_bytes, row_bytes = _layout()
    # Up to a cache line's end.
    rows = -(-M * (K * value_bytes + row_bytes) // 64) * 64
    groups = torch.get_num_threads() * (group_bytes + strip * depth * -(-K // depth))
    memory = native.scratch(rows + groups)
    start = memory.data_ptr()
    return memory, start + rows, start


def int8_layer(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: float = 0.0,
    input_zero_point: int = 0,
    weight_sum: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """``mixft.kernels.static_int8_linear.static_int8_linear``, or without a ``weight_sum`` the dynamic layer.

    ``left`` and ``right`` are as in the dynamic layer.
    """
    x, weight, columns = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device="cpu")
    bias = None if bias is None else bias.contiguous()
    room = room_for(M, K)
    linear(
        *(*native.typed(x), M, K, N),
        *(native.address(weight), native.address(columns), native.address(weight_sum), input_scale, input_zero_point),
        *(*native.typed(bias), CODES[activation], *low_rank(left, right), *native.typed(out), *room[1:]),
    )
    return out


def low_rank(left: Tensor | None, right: Tensor | None) -> tuple[int | None, int | None, int]:
    """The addresses of ``left`` [M, rank] and ``right`` [rank, N], contiguous FP32, and their rank; 0 without them."""
    return (None, None, 0) if left is None else (native.address(left), native.address(right), left.shape[1])


@functools.cache
def _matches_exact_products() -> bool:
    """Compare the compiled products with exact ones at the extremes, where saturated sums would show."""
    generator = torch.Generator("cpu").manual_seed(0)
    for M, K, N in ((1, 64, 32), (33, 257, 65)):
        values = torch.randint(-127, 128, (M, K), dtype=torch.int8, device="cpu", generator=generator)
        weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, device="cpu", generator=generator)
        values[:, 0], values[0], weight[0], weight[1] = 127, -127, 127, -128
        # A row whose largest magnitude is 127 is its own quantization, with a scale of 1.
        one = torch.ones(N, 1, dtype=torch.float32, device="cpu")
        found = int8_layer(values.float(), weight, one, None, "none")
        if not torch.equal(found, (values.double() @ weight.double().t()).float()):
            return False
    return True


def is_exact() -> bool:
    """Whether there are compiled products here that are exact; the first call tries them."""
    return native.available() and _matches_exact_products()
