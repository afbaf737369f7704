"""A gradient in int8 by rows and by columns on the CPU: read once for the rows' values, once more for the columns'."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .quantize import quantize

compiled = native.Routine("quantize_gradient", c_void_p, c_int, *[c_int64] * 3, *[c_void_p] * 11)


def quantize_gradient(
    grad: Tensor, row_factor: Tensor, column_factor: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``mixft.kernels.quantize_gradient.quantize_gradient``; here the transposed values are a view."""
    column_seed = None if seed is None else seed ^ 1
    if not (native.available() and grad.numel()):
        rows = quantize(grad.unsqueeze(-1), True, seed, column_factor, True)
        columns = quantize(grad.unsqueeze(0), True, column_seed, row_factor, True)
        values, transposed = rows[0].view(grad.shape), columns[0].view(grad.shape).t()
        return values, rows[1].view(-1, 1), transposed, columns[1].view(-1, 1), grad.sum(0, dtype=torch.float32)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    M, N = grad.shape
    values, by_column = torch.empty((2, M, N), dtype=torch.int8, device="cpu")
    scale, column_scale = (torch.empty((size, 1), dtype=torch.float32, device="cpu") for size in (M, N))
    blocks = -(-M // native.constant("quantize_gradient_rows"))
    # A row of sums, and of the bits of magnitudes, for each block, and a row of inverse scales.
    work = torch.empty((2 * blocks + 1, N), dtype=torch.float32, device="cpu")
    compiled(
        *native.typed(grad),
        M,
        N,
        grad.stride(0),
        native.address(row_factor),
        native.address(column_factor),
        native.address(seed),
        native.address(column_seed),
        values.data_ptr(),
        scale.data_ptr(),
        by_column.data_ptr(),
        column_scale.data_ptr(),
        work[blocks].data_ptr(),
        work.data_ptr(),
        work[2 * blocks].data_ptr(),
    )
    return values, scale, by_column.t(), column_scale, work[0].clone()
