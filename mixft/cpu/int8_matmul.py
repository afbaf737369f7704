"""CPU routines of the int8 products: ``torch._int_mm`` on AVX512-VNNI, elsewhere compiled, or exact FP32 products."""

import functools
from ctypes import c_int, c_int64, c_void_p
from math import isfinite

import torch
from torch import Tensor

from . import native
from .activation import ACTIVATIONS, CODES
from .instruction_set import has_bf16_dot, has_int8_dot
from .int8_epilogue import apply_int8_epilogue
from .int8_layer import room_for, serves
from .overlap import without_overlap
from .packed_weight import packed_product, packed_weight
from .unsigned_rows import unsigned_limbs

# The largest K whose int8 products sum exactly in FP32: 1024 * 128 * 128 = 2**24.
EXACT_FP32_K = 1024

# Up to this many rows a product in FP32 is faster than three of bytes.
FEW_ROWS = 6

# Without instructions for bytes those never pay, and up to this many rows the compiled product in FP32 beats torch's.
FEW_ROWS_WITHOUT_VNNI = 128

few_rows_product = native.Routine(
    "weight_only_product",
    *(c_void_p, c_int, c_int64, c_int64, c_int64),
    *(c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p),
)

product_of_limbs = native.Routine(
    "weight_only_limbs",
    *(c_void_p, c_int, c_int64, c_int64, c_int64),
    *(c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p, c_void_p),
)

compiled_product = native.Routine(
    "int8_matmul",
    *(c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p),
    *(c_void_p, c_int, c_int, c_void_p, c_int, c_void_p, c_void_p),
)

# Elements of a piece of an operand or result: what is made of it on the way stays in the caches.
PIECE = 1 << 18


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    """``mixft.kernels.int8_matmul.int8_matmul`` on the CPU."""
    if a.numel() and b.numel() and not int_mm_is_fast_and_exact() and serves(a.shape[0]):
        return _compiled(a, b, a_scale, b_scale, bias, activation, out_dtype, a_zero_point, b_sum)
    product = integer_product(a, b.t())
    return apply_int8_epilogue(product, a_scale, b_scale, bias, activation, out_dtype, a_zero_point, b_sum)


def _compiled(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None,
    b_sum: Tensor | None,
) -> Tensor:
    (M, K), N = a.shape, b.shape[0]
    by_row = not b.is_contiguous() and b.t().is_contiguous()
    # One scale for all columns goes with the rows'.
    if b_scale.stride(0) == 0 or N == 1:
        a_scale, b_scale = a_scale * b_scale[:1], None
    parts = [a, b.t() if by_row else b, a_scale, b_scale, a_zero_point, b_sum, bias]
    # Held until the call returns.
    a, b, *columns, bias = [None if part is None else part.contiguous() for part in parts]
    out = torch.empty((M, N), dtype=out_dtype, device="cpu")
    room = room_for(M, K)
    compiled_product(
        *(native.address(a), M, K, N, native.address(b), by_row, *map(native.address, columns)),
        *(*native.typed(bias), CODES[activation], *native.typed(out), *room[1:]),
    )
    return out


def weight_only_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    """``mixft.kernels.int8_matmul.weight_only_matmul`` on the CPU.

    Few rows are multiplied in FP32 by the compiled product, which widens the weight in registers. More rows are
    multiplied by three bytes of each activation, exact in int32: that takes activations to within 2^-22 of their row's
    largest magnitude, in less time than an FP32 product. Without a fast product of bytes, and with a NaN or Inf among
    the activations, the product is one of floats.
    """
    rows, out = a.shape[0], None
    of_bytes = native.available() and _multiplies_bytes()
    few = FEW_ROWS if of_bytes else FEW_ROWS_WITHOUT_VNNI
    if a.numel() and rows <= few and b.is_contiguous() and native.available():
        return _few_rows(a, b, b_scale, bias, activation, out_dtype)
    # NaN and infinity show in the sum of the extremes.
    if a.numel() and b.numel() and isfinite(sum(torch.aminmax(a))):
        if of_bytes and serves(3 * rows):
            return _many_rows(a, b, b_scale, bias, activation, out_dtype)
        out = _packed_product_of_limbs(a, b, b_scale)
    if out is None:
        exact = torch.bfloat16 if a.dtype == torch.bfloat16 and has_bf16_dot() else torch.float32
        out = torch.mm(a.to(exact), b.to(exact).t()).float().mul_(b_scale.view(-1))
    if bias is not None:
        out.add_(bias)
    return ACTIVATIONS[activation](out).to(out_dtype)


def _few_rows(
    a: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    a, b_scale = a.contiguous(), b_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device="cpu")
    room = native.scratch(4 * M * (K + native.constant("weight_only_padding")))
    few_rows_product(
        *(*native.typed(a), M, K, N, native.address(b), native.address(b_scale), *native.typed(bias)),
        *(CODES[activation], *native.typed(out), room.data_ptr()),
    )
    return out


@functools.cache
def _multiplies_bytes() -> bool:
    """Whether the compiled products are of bytes; elsewhere they are of 16-bit numbers."""
    return native.constant("int8_depth") == 4


def _many_rows(
    a: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    a, b, b_scale = a.contiguous(), b.contiguous(), b_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device="cpu")
    room = room_for(3 * M, K)
    product_of_limbs(
        *(*native.typed(a), M, K, N, native.address(b), native.address(b_scale), *native.typed(bias)),
        *(CODES[activation], *native.typed(out), *room[1:]),
    )
    return out


def _packed_product_of_limbs(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor | None:
    packed = packed_weight(b)
    if packed is None:
        return None
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.float32, device="cpu")
    rows = max(16, PIECE // max(b.shape))
    for source, target in zip(a.split(rows), out.split(rows), strict=True):
        limbs, scale = unsigned_limbs(source)
        parts = packed_product(limbs.view(-1, a.shape[1]), packed, b_scale, exact=True).view(3, len(source), -1)
        torch.add(parts[0], parts[1], alpha=2**-8, out=target).add_(parts[2], alpha=2**-16).mul_(scale)
    return out


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact int32 product of int8 ``a`` [M, K] and ``b`` [K, N], of any strides."""
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device="cpu")
    if int_mm_is_fast_and_exact():
        return torch._int_mm(_with_true_strides(a), _with_true_strides(b))
    return fp32_integer_product(a, b)


def _with_true_strides(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy where its strides, which ``torch._int_mm`` hands to oneDNN as they are, would mislead that.

    Torch leaves the stride of a dimension of size 1 open: then there may be neither a product nor an error (pytorch
    #195066). Of rows or columns that overlap the product is wrong.
    """
    if 1 in matrix.shape:
        return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))
    return without_overlap(matrix)


def fp32_integer_product(a: Tensor, b: Tensor) -> Tensor:
    """:func:`integer_product` through FP32 products short enough in K to be exact."""
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device="cpu")
    for start in range(0, a.shape[1], EXACT_FP32_K):
        stop = start + EXACT_FP32_K
        total += torch.mm(a[:, start:stop].float(), b[start:stop].float()).to(torch.int32)
    return total


@functools.cache
def int_mm_is_fast_and_exact() -> bool:
    """Whether to use ``torch._int_mm`` here.

    It needs dot-product instructions to be faster than FP32, and it has been silently wrong on a CPU without them
    (pytorch #136746), so the first call holds it to an exact product at the extremes where saturation would show.
    """
    if not has_int8_dot():
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    for M, K, N in ((1, 64, 32), (33, 257, 65)):
        a = torch.randint(-128, 128, (M, K), dtype=torch.int8, device="cpu", generator=generator)
        b = torch.randint(-128, 128, (K, N), dtype=torch.int8, device="cpu", generator=generator)
        a[0], b[:, 0] = -128, 127
        if not torch.equal(torch._int_mm(a, b), fp32_integer_product(a, b)):
            return False
    return True
